"""Where pictures come from: a folder, an archive of one, or Hugging-Face-style parquet.

All three become the same: a list of :class:`Item`, each read when it is its turn. Those of a folder
or an archive are mixed, for names usually lie sorted by class, and a window of training holds few
row groups: packed as they lie, a batch would be of a few classes. Parquet is taken as it lies.

A folder's pictures have labels when each is in a sub-folder of the source and there are at
least two such sub-folders; deeper folders only make the key longer.
"""

import gzip
import hashlib
import json
import logging
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from droppos.errors import DataError
from pipelines.shards import MANIFEST, Manifest, load_manifest
from pipelines.storage import Entry, Place, explained

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
PARQUET = ".parquet"
NOT_PICTURES = {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf"}
"""Extensions that Pillow has a reader for, if only to say that it can't."""


_log = logging.getLogger(__name__)

Refusal = tuple[str, str]
"""Kind and reason."""


@dataclass(frozen=True)
class Item:
    """Something in the source that may be a picture."""

    key: str
    """Path relative to the source; unique."""
    label: int | None
    """Index into the source's classes."""
    read: Callable[[], bytes | None]
    """Fetch the bytes, from any thread; none when the source holds none for it."""


@dataclass(frozen=True)
class Source:
    """The pictures of one source, in the order in which they are packed."""

    uri: str
    """As it was opened."""
    fingerprint: str
    """SHA-256 of the names and sizes of its files."""
    total: int
    """Number of items: what may be pictures."""
    items_from: Callable[[int], Iterator[Item]]
    """Iterate items from one on, always in the same order."""
    classes: tuple[str, ...] | None
    """Name of each label; none without labels."""
    mixed: bool
    """Whether they lie mixed, whatever their names."""
    refused: dict[str, Refusal]
    """By key, of what is no picture by its name, and no item."""


Members = tuple[dict[str, Callable[[], bytes]], dict[str, Refusal]]
"""Of an archive, by name: how each file is read, and why others are left out."""


@contextmanager
def open_source(place: Place) -> Iterator[Source]:
    """List what is at ``place``; the items can be read until the block ends.

    Raises:
        DataError: If there is nothing, or nothing that could be pictures.
    """
    place.check_reachable()
    if not place.exists():
        raise DataError(f"source {place} does not exist; give a folder, archive or parquet file")
    if place.name.lower().endswith(ARCHIVES) and place.is_file():
        with _open_archive(place) as source:
            yield source
        return
    if place.is_file() and not place.name.lower().endswith(PARQUET):
        raise DataError(
            f"source {place} is a file, but neither {', '.join(ARCHIVES)} nor {PARQUET}; "
            "give the folder it is in"
        )
    files = [Entry("", place.size())] if place.is_file() else place.files()
    if not files:
        raise DataError(f"source {place} is empty; give a folder with pictures in it")
    tables = [f for f in files if (f.name or place.name).lower().endswith(PARQUET)]
    if tables and all(_refusal(f.name) for f in files if f not in tables):
        prepared = MANIFEST in {file.name for file in files}
        yield _parquet(place, tables, load_manifest(place) if prepared else None)
    else:
        again = {} if place.is_s3 else _links_back(place, files)
        fingerprint = _fingerprint(files)
        names = [file.name for file in files if not (again and _is_below(file.name, again))]
        del files  # of millions, each thing that is kept is gigabytes
        yield _folder(place.uri, fingerprint, names, lambda n: (place / n).read_bytes(), again)


def _links_back(place: Place, files: list[Entry]) -> dict[str, Refusal]:
    """Find folders that are links to one they are in: their pictures would come again and again."""
    real: dict[Path, Path] = {}
    found: dict[str, Refusal] = {}
    root = Path(place.path)
    for folder in sorted(map(Path, {file.name.rpartition("/")[0] for file in files})):
        for part in [*list(folder.parents)[::-1], folder]:
            if part in real:
                continue
            real[part] = (root / part).resolve()
            above = (real[parent] for parent in part.parents)
            if real[part] in above and not _is_below(part.as_posix(), found):
                found[part.as_posix()] = "link to itself", "it links to a folder that it is in"
    return found


def _is_below(name: str, folders: Container[str]) -> bool:
    return any(str(parent) in folders for parent in PurePosixPath(name).parents)


def _folder(
    uri: str,
    fingerprint: str,
    files: Sequence[str],
    read: Callable[[str], bytes],
    left_out: Mapping[str, Refusal],
) -> Source:
    refused = {name: reason for name in sorted(files) if (reason := _refusal(name))}
    names = sorted((name for name in files if name not in refused), key=_mixed)
    refused = {_shown(name): reason for name, reason in {**refused, **left_out}.items()}
    tops = sorted({name.split("/", 1)[0] for name in names if "/" in name})
    labelled = len(tops) > 1 and all("/" in name for name in names)
    if len(tops) > 1 and not labelled:
        stray = next(name for name in names if "/" not in name)
        _log.warning(
            "%s has %d sub-folders, but pictures beside them, such as %s: no picture gets a label; "
            "if each sub-folder is a class, move those away, and prepare again",
            *(uri, len(tops), stray),
        )
    numbers = {top: i for i, top in enumerate(tops)} if labelled else {}
    classes = tuple(tops) if labelled else None

    def items_from(first: int) -> Iterator[Item]:
        for name in islice(names, first, None):
            yield Item(name, numbers.get(name.split("/", 1)[0]), partial(read, name))

    return Source(uri, fingerprint, len(names), items_from, classes, True, refused)


def _mixed(name: str) -> bytes:
    """Place a name among others as if at random, whatever the others are."""
    return hashlib.blake2b(
        name.encode(errors="surrogateescape"), digest_size=16, person=b"order"
    ).digest()


def _shown(name: str) -> str:
    """Write a name so that it can be stored, whatever its bytes."""
    return name.encode(errors="backslashreplace").decode()


def _refusal(name: str) -> Refusal | None:
    """Kind and reason why a file is no picture, by its name alone; none if it may be one.

    A name without extension may be one: data sets named by hash have no other.
    """
    if _shown(name) != name:
        return "name is not UTF-8", "rename it in the archive, or unpack and rename"
    if _is_hidden(name):
        return "hidden file", "its name, or a folder's, starts with a dot"
    suffix = Path(name).suffix.lower()
    if suffix and (suffix in NOT_PICTURES or suffix not in Image.registered_extensions()):
        return "not a picture", f"Pillow reads no pictures from {suffix} files"
    return None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _fingerprint(files: list[Entry]) -> str:
    """Hash their JSON, piece by piece: of millions it is a gigabyte."""
    digest = hashlib.sha256(b"[")
    for number, file in enumerate(files):
        digest.update((", " * bool(number) + json.dumps(file)).encode())
    digest.update(b"]")
    return digest.hexdigest()


@contextmanager
def _open_archive(place: Place) -> Iterator[Source]:
    """Read an archive's members in another order than theirs, which needs random access.

    So one that is on S3, or compressed as a whole, is first unpacked into one temporary file;
    TMPDIR says where.
    """
    fingerprint = _fingerprint([Entry(place.name, place.size())])
    gzipped = place.name.lower().endswith((".gz", ".tgz"))
    try:
        with tempfile.NamedTemporaryFile(prefix="droppos-") as copy:
            path = Path(place.path)
            if place.is_s3 or gzipped:
                _copy(place, copy, gzipped)
                path = Path(copy.name)
            members = _zip_members if place.name.lower().endswith(".zip") else _tar_members
            with members(path) as (fetch, left_out):
                if not fetch:
                    raise DataError(f"source {place} holds no files; give one with pictures in it")
                common = _common_folder(fetch)
                yield _folder(
                    place.uri,
                    fingerprint,
                    [name.removeprefix(common) for name in fetch],
                    lambda name: fetch[common + name if common + name in fetch else name](),
                    {name.removeprefix(common): reason for name, reason in left_out.items()},
                )
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"source {place} is no archive, or a damaged one ({error}); fetch or make it again"
        ) from error


def _copy(place: Place, copy: Any, gzipped: bool) -> None:
    with explained(place, "unpack"), place.open_input() as source:
        unpacked: Any = gzip.GzipFile(fileobj=source) if gzipped else source
        shutil.copyfileobj(unpacked, copy, 1 << 22)
        copy.flush()


@contextmanager
def _tar_members(path: Path) -> Iterator[Members]:
    fetch: dict[str, Callable[[], bytes]] = {}
    left_out: dict[str, Refusal] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            name = _clean(member.name)
            # A name that comes twice was updated: the last one counts, as when unpacking.
            if member.isfile():
                fetch[name] = partial(_read_at, path, member.offset_data, member.size)
            elif member.islnk() and (linked := fetch.get(_clean(member.linkname))) is not None:
                fetch[name] = linked
            elif not member.isdir():
                left_out[name] = "no file", "a link that is not followed, or a device"
        yield fetch, left_out


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


@contextmanager
def _zip_members(path: Path) -> Iterator[Members]:
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
        if any(m.flag_bits & 1 for m in members):
            raise DataError(f"{path} is encrypted; unpack it and give the folder")
        yield {_clean(m.filename): partial(archive.read, m) for m in members}, {}


def _clean(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in {"", "."})


def _common_folder(names: Iterable[str]) -> str:
    """Find the one folder that an archive of a folder usually starts with, and its slash."""
    visible = [name for name in names if not _is_hidden(name)]
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in visible}
    return "" if len(tops) != 1 or "" in tops else f"{next(iter(tops))}/"


def _parquet(place: Place, tables: list[Entry], prepared: Manifest | None) -> Source:
    """Read Hugging-Face-style parquet: a column `image`, perhaps a column `label`.

    Of a prepared data set, names of pictures and classes stay what they are.
    """
    files = [place / table.name if table.name else place for table in tables]
    rows: list[int] = []
    for file in files:
        with _opened(file) as parquet:
            _check_columns(file, parquet.schema_arrow)
            rows.append(parquet.metadata.num_rows)
    classes = _classes(files) if prepared is None else prepared.classes
    if sum(rows) == 0:
        raise DataError(f"source {place} has no rows; give one with pictures in it")

    def items_from(first: int) -> Iterator[Item]:
        for file, table, count in zip(files, tables, rows, strict=True):
            if first < count:
                stem = None if prepared else (table.name or file.name)[: -len(PARQUET)]
                yield from _rows(file, stem, classes, first)
            first = max(0, first - count)

    return Source(place.uri, _fingerprint(tables), sum(rows), items_from, classes, False, {})


@contextmanager
def _opened(file: Place) -> Iterator[pq.ParquetFile]:
    try:
        with explained(file, "read"), file.open_input() as source:
            yield pq.ParquetFile(source, pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is no parquet file, or a damaged one ({error})") from error


def _check_columns(file: Place, schema: pa.Schema) -> None:
    if "image" not in schema.names:
        raise DataError(
            f"{file} has no column 'image', its columns are {', '.join(schema.names)}; rename the "
            "one that holds encoded pictures"
        )
    kind = schema.field("image").type
    if not _is_binary(kind) and not (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    ):
        raise DataError(
            f"{file}: column 'image' is {kind}; expected encoded pictures, as binary or as "
            "struct<bytes: binary, path: string>"
        )


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _classes(files: list[Place]) -> tuple[str, ...] | None:
    """Name the labels: as Hugging Face's metadata does, else by the values there are."""
    values: set[Any] = set()
    for file in files:
        with _opened(file) as parquet:
            schema = parquet.schema_arrow
            if "label" not in schema.names:
                return None
            names = _class_names(schema)
            if names:
                return names
            values.update(parquet.read(columns=["label"]).column("label").unique().to_pylist())
    known = values - {None, -1}
    if not known:
        return None
    if all(isinstance(value, int) for value in known):
        return tuple(str(i) for i in range(max(known) + 1))
    if all(isinstance(value, str) for value in known):
        return tuple(sorted(known))
    raise DataError(
        f"{files[0]}: column 'label' holds {next(iter(known))!r}; expected whole numbers or text"
    )


def _class_names(schema: pa.Schema) -> tuple[str, ...] | None:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get("label", {})
    return tuple(feature["names"]) if "names" in feature else None


def _rows(
    file: Place, stem: str | None, classes: tuple[str, ...] | None, first: int
) -> Iterator[Item]:
    """Iterate a file's rows from one on; one row group is in memory at a time.

    Args:
        file: To be read.
        stem: Of the keys, which count its rows; None takes the column `key`.
        classes: Their names; None without labels.
        first: Row to begin with.
    """
    numbers = {name: i for i, name in enumerate(classes or ())}
    columns = ["image", *(["label"] if classes else []), *([] if stem else ["key"])]
    with _opened(file) as parquet:
        start = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if start + count > first:
                table = parquet.read_row_group(group, columns=columns)
                for i in range(max(0, first - start), count):
                    value = table["label"][i].as_py() if classes else None
                    label = numbers.get(value) if isinstance(value, str) else value
                    label = None if label is None or label < 0 else label
                    if label is not None and label >= len(numbers):
                        raise DataError(
                            f"{file}: row {start + i} has label {label}, but there are only "
                            f"{len(numbers)} classes; mend the column or its metadata"
                        )
                    image = table["image"][i].as_py()
                    data = image.get("bytes") if isinstance(image, dict) else image
                    key = f"{stem}/{start + i:08d}" if stem else table["key"][i].as_py()
                    yield Item(key, label, partial(_given, data))
            start += count


def _given(data: bytes | None) -> bytes | None:
    return data
