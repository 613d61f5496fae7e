"""Parquet as Hugging Face keeps it, and prepared data sets."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from droppos.errors import DataError
from pipelines.shards import Manifest
from pipelines.sources.item import Item, Source, Wanted, listed
from pipelines.sources.labels import MOST_CLASSES, PARTS
from pipelines.storage import Place, explained

SUFFIX = ".parquet"

log = logging.getLogger(__name__)


class _Columns(NamedTuple):
    image: str
    label: str | None


def read_parquet(
    place: Place,
    names: list[str],
    fingerprint: str,
    wanted: Wanted,
    prepared: Manifest | None,
) -> Source:
    """List the rows of parquet files: a column of pictures, perhaps one of labels.

    Of a prepared data set, names of pictures and classes stay what they are.

    Args:
        place: The file, or the folder that they are in.
        names: Of the files, relative to it; empty for itself.
        fingerprint: SHA-256 of their names and sizes.
        wanted: Which columns.
        prepared: Of a prepared data set.

    Raises:
        DataError: If there are no such columns or no rows, or if the files are of parts of a data
            set that are kept apart.
    """
    if wanted.only is None:
        _refuse_parts(place, names)
    files = [place / name if name else place for name in names]
    rows: list[int] = []
    columns = None
    for file in files:
        with opened(file) as parquet:
            columns = _columns(file, parquet.schema_arrow, wanted, columns)
            rows.append(parquet.metadata.num_rows)
    if columns is None or sum(rows) == 0:
        raise DataError(f"source {place} has no rows; give one with pictures in it")
    classes = _classes(files, columns.label) if prepared is None else prepared.classes

    def items_from(first: int) -> Iterator[Item]:
        before = 0
        for file, name, count in zip(files, names, rows, strict=True):
            if first < before + count:
                stem = None if prepared else (name or file.name)[: -len(SUFFIX)]
                yield from _rows(file, stem, columns, classes, before, max(0, first - before))
            before += count

    return Source(place.uri, fingerprint, sum(rows), items_from, classes, False, {})


def _refuse_parts(place: Place, names: list[str]) -> None:
    """Refuse files of more than one part, by the words in their paths that not all of them have."""
    words = [{*re.findall("[A-Za-z]+", name)} for name in names]
    parts = [{word for word in each if word.lower() in PARTS} for each in words]
    found = sorted(set().union(*parts) - set.intersection(*parts))
    if len(found) > 1:
        raise DataError(
            f"source {place} holds files of {listed(found)}, parts of a data set that are kept "
            f"apart; prepare each by itself, with --only '*{found[0]}*' say, or all of them as one "
            "with --only '*'"
        )


@contextmanager
def opened(file: Place) -> Iterator[pq.ParquetFile]:
    """Open a parquet file.

    Raises:
        DataError: If it is none.
    """
    try:
        with explained(file, "read"), file.open_input() as source:
            yield pq.ParquetFile(source, pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is no parquet file, or a damaged one ({error})") from error


def _columns(file: Place, schema: pa.Schema, wanted: Wanted, before: _Columns | None) -> _Columns:
    """Find where pictures and labels are; of later files, as in the first one."""
    if before is not None:
        for column in before:
            if column is not None and column not in schema.names:
                raise DataError(
                    f"{file} has no column {column!r}, which the files before it have; its columns "
                    f"are {listed(schema.names)}: take it away, or mend it"
                )
        return before
    for column in (wanted.image_column, wanted.label_column):
        if column is not None and column not in schema.names:
            raise DataError(
                f"{file} has no column {column!r}; its columns are {listed(schema.names)}"
            )
    image = wanted.image_column or _image_column(file, schema)
    kind = schema.field(image).type
    if not _holds_pictures(kind):
        raise DataError(
            f"{file}: column {image!r} is {kind}; expected encoded pictures, as binary or as "
            "struct<bytes: binary, path: string>"
        )
    label = wanted.label_column or _label_column(file, schema)
    if label is not None and not _holds_labels(schema.field(label).type):
        raise DataError(
            f"{file}: column {label!r} is {schema.field(label).type}; expected labels, as whole "
            "numbers or text: name another one with --label-column"
        )
    return _Columns(image, label)


def _image_column(file: Place, schema: pa.Schema) -> str:
    if "image" in schema.names:
        return "image"
    likely = [field.name for field in schema if _holds_pictures(field.type)]
    if len(likely) == 1:
        return likely[0]
    raise DataError(
        f"{file} has no column 'image', its columns are {listed(schema.names)}; name the one that "
        "holds encoded pictures with --image-column" + f", of {listed(likely)} say" * bool(likely)
    )


def _label_column(file: Place, schema: pa.Schema) -> str | None:
    if "label" in schema.names:
        return "label"
    named = [name for name in schema.names if _class_names(schema, name)]
    if len(named) == 1:
        return named[0]
    if named:
        log.warning(
            "%s has no column 'label', but %s: no picture gets a label; name one with "
            "--label-column",
            *(file, listed(named)),
        )
    return None


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    of_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return of_text or pa.types.is_integer(kind) or pa.types.is_null(kind)


def _classes(files: list[Place], column: str | None) -> tuple[str, ...] | None:
    """Name the labels: as Hugging Face's metadata does, else by the values there are."""
    if column is None:
        return None
    values: set[Any] = set()
    names = None
    for file in files:
        with opened(file) as parquet:
            own = _class_names(parquet.schema_arrow, column)
            if names is not None and own != names:
                raise DataError(
                    f"{file} calls its classes otherwise than the files before it, so its labels "
                    "would be wrong; prepare it by itself (--only), or mend its metadata"
                )
            if own is not None:
                names = own
                continue
            values.update(parquet.read(columns=[column]).column(column).unique().to_pylist())
    if names is not None:
        return names
    known = values - {None, -1}
    if not known:
        return None
    if all(isinstance(value, int) for value in known):
        if max(known) >= MOST_CLASSES:
            raise DataError(
                f"column {column!r} holds {max(known)}, which is no number of a class: there may "
                f"be {MOST_CLASSES:,}; name another one with --label-column"
            )
        return tuple(str(i) for i in range(max(known) + 1))
    if all(isinstance(value, str) for value in known):
        return tuple(sorted(known))
    raise DataError(
        f"{files[0]}: column {column!r} holds {next(iter(known))!r}; expected whole numbers or text"
    )


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column, {})
    return tuple(feature["names"]) if "names" in feature else None


def _rows(
    file: Place,
    stem: str | None,
    columns: _Columns,
    classes: tuple[str, ...] | None,
    before: int,
    first: int,
) -> Iterator[Item]:
    """Iterate a file's rows from one on; one row group is in memory at a time.

    Args:
        file: To be read.
        stem: Of the keys, which count its rows; None takes the column `key`.
        columns: Where pictures and labels are.
        classes: Their names; None without labels.
        before: Rows of the files before this one.
        first: Row to begin with.
    """
    numbers = {name: i for i, name in enumerate(classes or ())}
    image, label = columns.image, columns.label if classes else None
    asked = [image, *([label] if label else []), *([] if stem else ["key"])]
    with opened(file) as parquet:
        start = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if start + count > first:
                table = parquet.read_row_group(group, columns=asked)
                for i in range(max(0, first - start), count):
                    value = table[label][i].as_py() if label else None
                    number = numbers.get(value) if isinstance(value, str) else value
                    number = None if number is None or number < 0 else number
                    if number is not None and number >= len(numbers):
                        raise DataError(
                            f"{file}: row {start + i} has label {number}, but there are only "
                            f"{len(numbers)} classes; mend the column or its metadata"
                        )
                    picture = table[image][i].as_py()
                    data = picture.get("bytes") if isinstance(picture, dict) else picture
                    key = f"{stem}/{start + i:08d}" if stem else table["key"][i].as_py()
                    yield Item(before + start + i, key, number, partial(_given, data))
            start += count


def _given(data: bytes | None) -> bytes | None:
    return data
