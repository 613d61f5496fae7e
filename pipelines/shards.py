"""The data set a run reads: parquet shards of encoded pictures, and a manifest that counts them.

Parquet, because Ray Data, pyarrow, Hugging Face and DuckDB all read it; uncompressed, since
JPEG does not shrink; in row groups of about 100 pictures, so that a reader takes pictures from
all over the data set without reading all of it.

    DEST/manifest.json            written last: a folder without it is not a data set yet
    DEST/shard-00000.parquet ...  image, key, label, width, height
    DEST/set_aside.jsonl          pictures that are not in it, each with the reason

A picture's row id is its position in (shard, row group, row) order.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from droppos.errors import DataError
from pipelines.copies import Bounded, bounded_from_json
from pipelines.storage import Place

SCHEMA_VERSION = 1
"""Goes up when an older reader would misread a data set."""
MANIFEST = "manifest.json"
GROUP_ROWS = 100
"""Pictures of a row group: about 10 MB of photographs, one request to object storage."""
SHARD_BYTES = 64 * 1024 * 1024
"""Encoded bytes after which a shard is closed."""

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)


class Picture(NamedTuple):
    """One row of a shard."""

    image: bytes
    """The file's bytes, exactly as they were found; or those of its bounded copy."""
    key: str
    """Path relative to the source; unique in the data set."""
    label: int | None
    """Index into the manifest's classes."""
    width: int
    """Pixels, of the picture held upright (EXIF orientation applied)."""
    height: int
    """Pixels, of the picture held upright."""


class Group(NamedTuple):
    """A row group, the least that is read at once."""

    shard: int
    """Index into the manifest's shards."""
    group: int
    """Index in the shard."""
    start: int
    """Row id of the first row."""
    rows: int
    """Number of rows."""


@dataclass(frozen=True)
class Shard:
    """One parquet file of the data set."""

    name: str
    """File name, below the manifest's place."""
    rows: int
    """Pictures."""
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Of the file."""
    content: str
    """SHA-256 of keys, labels and picture bytes in order: the same whichever version of
    pyarrow wrote the file."""


@dataclass(frozen=True)
class Manifest:
    """What a prepared data set holds, and in which order."""

    shards: tuple[Shard, ...]
    """In the order of their rows' ids."""
    classes: tuple[str, ...] | None = None
    """Name of each label; none when the pictures have no labels."""
    set_aside: int = 0
    """Pictures and other files of the source that are not in the data set."""
    schema_version: int = SCHEMA_VERSION
    """Version of the format the data set was written in."""
    bounded: Bounded | None = None
    """Which pictures are copies; none when all are as they were found."""

    @cached_property
    def rows(self) -> int:
        """Pictures in all shards."""
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Every row group, in the order of its rows' ids."""
        groups: list[Group] = []
        start = 0
        for index, shard in enumerate(self.shards):
            for group, rows in enumerate(shard.row_groups):
                groups.append(Group(index, group, start, rows))
                start += rows
        return tuple(groups)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the pictures, their labels, order and grouping.

        Two data sets of one digest feed a run the same pictures in the same order, so a
        checkpoint's position in one is right in the other.
        """
        content = [(shard.content, shard.row_groups) for shard in self.shards]
        return hashlib.sha256(_canonical([self.schema_version, self.classes, content])).hexdigest()

    def to_json(self) -> str:
        """Write the manifest for people and for :meth:`from_json`."""
        head = {"schema_version": self.schema_version, "rows": self.rows, "digest": self.digest}
        # Only where there are copies, so that other manifests stay as older versions wrote them.
        bounded = {"bounded": asdict(self.bounded)} if self.bounded else {}
        tail = {"set_aside": self.set_aside, **bounded, "classes": self.classes}
        shards = [asdict(shard) for shard in self.shards]
        return json.dumps({**head, **tail, "shards": shards}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = "the manifest") -> "Manifest":
        """Read what :meth:`to_json` wrote.

        Args:
            text: The JSON text.
            origin: Where it is from, for messages.

        Raises:
            DataError: If the text is no manifest, is of a newer version, lacks a key, or
                contradicts itself.
        """
        try:
            loaded = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{origin} is not JSON ({error}); prepare the data set again"
            ) from error
        if not isinstance(loaded, dict):
            raise DataError(f"{origin} must be a JSON object, got {type(loaded).__name__}")
        version = _take(loaded, "schema_version", int, origin)
        if version > SCHEMA_VERSION:
            raise DataError(
                f"{origin} has schema_version {version}, this droppos reads up to "
                f"{SCHEMA_VERSION}; upgrade droppos, or prepare the data set again"
            )
        classes = _take(loaded, "classes", list | None, origin)
        manifest = cls(
            shards=tuple(shard_from_json(s, origin) for s in _take(loaded, "shards", list, origin)),
            classes=None if classes is None else tuple(classes),
            set_aside=_take(loaded, "set_aside", int, origin),
            schema_version=version,
            bounded=bounded_from_json(loaded.get("bounded"), origin),
        )
        for key in ("rows", "digest"):
            said, found = _take(loaded, key, object, origin), getattr(manifest, key)
            if said != found:
                raise DataError(
                    f"{origin} says {key} {said}, but its shards make it {found}: it was changed "
                    "by hand or damaged; restore it, or prepare the data set again"
                )
        return manifest


def shard_from_json(loaded: Any, origin: str) -> Shard:
    """Read one shard's entry of a manifest.

    Raises:
        DataError: If a key is missing, of the wrong type, or the row groups don't add up.
    """
    if not isinstance(loaded, dict):
        raise DataError(f"{origin}: a shard must be an object, got {loaded!r}")
    shard = Shard(
        name=_take(loaded, "name", str, origin),
        rows=_take(loaded, "rows", int, origin),
        row_groups=tuple(_take(loaded, "row_groups", list, origin)),
        bytes=_take(loaded, "bytes", int, origin),
        sha256=_take(loaded, "sha256", str, origin),
        content=_take(loaded, "content", str, origin),
    )
    if shard.rows != sum(shard.row_groups):
        raise DataError(
            f"{origin}: {shard.name} says {shard.rows} rows, its row groups hold "
            f"{sum(shard.row_groups)}; prepare the data set again"
        )
    return shard


def load_manifest(place: Place) -> Manifest:
    """Read the manifest of the data set at ``place``.

    Raises:
        DataError: If there is none, or it can't be read.
    """
    manifest = place / MANIFEST
    if not manifest.exists():
        there = [place.name] if place.is_file() else place.children()
        if not there:
            raise DataError(
                f"{place} is not a prepared data set: there is nothing; correct the name, or run "
                f"`droppos prepare SOURCE {place}`"
            )
        if "prepare.json" in there:
            raise DataError(
                f"{place} is not a prepared data set yet: it has no {MANIFEST}; run `droppos "
                f"prepare SOURCE {place}` again, which goes on where it was interrupted"
            )
        raise DataError(
            f"{place} is not a prepared data set: it has no {MANIFEST}; if pictures are in it, "
            f"`droppos prepare {place} DEST` makes one of them at DEST, which is to be named here"
        )
    return Manifest.from_json(manifest.read_bytes(), str(manifest))


def read_row_group(
    place: Place, shard: Shard, group: int, columns: list[str] | None = None
) -> pa.Table:
    """Read one row group.

    Args:
        place: Where the data set is.
        shard: One of its manifest's shards.
        group: Index of the row group in the shard.
        columns: Columns to read; all when not given.

    Raises:
        DataError: If the file is missing, damaged, or not the one the manifest speaks of.
        StorageError: If storage can't be asked for it, which says nothing about the file.
    """
    file = place / shard.name
    metadata = _footer(file, shard)

    def read(source: pa.NativeFile) -> pa.Table:
        with _damage_named(file):
            parquet = pq.ParquetFile(
                source, metadata=metadata, pre_buffer=True, page_checksum_verification=True
            )
            return parquet.read_row_group(group, columns=columns, use_threads=False)

    table = file.read(read)
    if table.num_rows != shard.row_groups[group]:
        found = f"row group {group} has {table.num_rows} rows, not {shard.row_groups[group]}"
        raise DataError(_damaged(file, found))
    return table


def read_rows(place: Place, manifest: Manifest, limit: int | None = None) -> Iterator[Picture]:
    """Iterate pictures in the order of their ids, for jobs small enough for one process.

    Args:
        place: Where the data set is.
        manifest: Its manifest.
        limit: At most so many pictures.
    """
    left = manifest.rows if limit is None else limit
    for group in manifest.groups:
        if left <= 0:
            return
        table = read_row_group(place, manifest.shards[group.shard], group.group)
        columns = (table.column(name).to_pylist() for name in Picture._fields)
        for row in list(zip(*columns, strict=True))[:left]:
            yield Picture(*row)
        left -= group.rows


class Rehashed(NamedTuple):
    """What a shard's file is found to be, whatever the manifest says."""

    sha256: str
    content: str
    row_groups: tuple[int, ...]


def rehash(file: Place) -> Rehashed:
    """Read a shard whole, and hash again what `Shard` has hashes of.

    Raises:
        DataError: If there is no such file, or it is no shard.
        StorageError: If storage refuses.
    """
    data = file.read_bytes()
    content, rows = hashlib.sha256(), []
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, use_threads=False)
            columns = (table.column(name).to_pylist() for name in Picture._fields)
            for row in zip(*columns, strict=True):
                content.update(_facts_of(Picture(*row)))
            rows.append(table.num_rows)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(_damaged(file, str(error))) from error
    return Rehashed(hashlib.sha256(data).hexdigest(), content.hexdigest(), tuple(rows))


class ShardWriter:
    """Fill one shard after another, and count and hash what goes in.

    A shard is held in memory until it is full: then it is written whole, and a process that
    is killed leaves none that is half there.
    """

    def __init__(
        self,
        place: Place,
        *,
        first: int = 0,
        shard_bytes: int = SHARD_BYTES,
        group_rows: int = GROUP_ROWS,
    ):
        """Start an empty shard.

        Args:
            place: Folder of the data set.
            first: Number of the first shard written.
            shard_bytes: Encoded bytes after which a shard is full.
            group_rows: Pictures of a row group; the last of a shard may have fewer.
        """
        self.place = place
        self.number = first
        self.shard_bytes = shard_bytes
        self.group_rows = group_rows
        self._groups: list[pa.Table] = []
        self._pending: list[Picture] = []
        self._bytes = 0
        self._content = hashlib.sha256()

    @property
    def is_full(self) -> bool:
        """Whether the shard should be closed before the next picture."""
        return self._bytes >= self.shard_bytes

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the last shard was closed."""
        return self._bytes == 0

    def add(self, picture: Picture) -> None:
        """Put a picture into the current shard."""
        self._pending.append(picture)
        self._bytes += len(picture.image)
        self._content.update(_facts_of(picture))
        if len(self._pending) == self.group_rows:
            self._close_group()

    def close_shard(self) -> Shard:
        """Write the current shard, which must not be empty, and start the next."""
        assert not self.is_empty
        self._close_group()
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(
            sink,
            SCHEMA,
            compression="none",
            use_dictionary=False,
            write_statistics=False,  # the smallest and largest JPEG of a group say nothing
            write_page_checksum=True,
        ) as writer:
            for table in self._groups:
                writer.write_table(table, row_group_size=self.group_rows)
        data = sink.getvalue()
        name = f"shard-{self.number:05d}.parquet"
        (self.place / name).write_bytes(data)
        row_groups = tuple(table.num_rows for table in self._groups)
        digest = hashlib.sha256(data).hexdigest()
        shard = Shard(
            name, sum(row_groups), row_groups, data.size, digest, self._content.hexdigest()
        )
        self.number += 1
        self._groups, self._bytes, self._content = [], 0, hashlib.sha256()
        return shard

    def _close_group(self) -> None:
        if self._pending:
            columns = zip(*self._pending, strict=True)
            arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
            self._groups.append(pa.Table.from_arrays(arrays, schema=SCHEMA))
            self._pending = []


@lru_cache(maxsize=4096)  # some 10 KB each; of ImageNet all
def _footer(file: Place, shard: Shard) -> pq.FileMetaData:
    """Read a shard's footer once in each process: from S3 it costs two requests.

    What raises is not kept, so the next call asks again.
    """

    def read(source: pa.NativeFile) -> pq.FileMetaData:
        if source.size() != shard.bytes:
            raise DataError(_damaged(file, f"it has {source.size()} bytes, not {shard.bytes}"))
        with _damage_named(file):
            return pq.read_metadata(source)

    metadata = file.read(read)
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if groups != shard.row_groups:
        raise DataError(_damaged(file, f"its row groups hold {groups}, not {shard.row_groups}"))
    return metadata


@contextmanager
def _damage_named(file: Place) -> Iterator[None]:
    """Tell what parquet finds wrong with a file from what storage raises while it is read."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        # Parquet's own have no number: a wrong checksum, a header that makes no sense.
        of_storage = isinstance(error, OSError) and (error.errno or "AWS Error" in str(error))
        if of_storage:
            raise
        raise DataError(_damaged(file, str(error))) from error


def _damaged(file: Place, found: str) -> str:
    return (
        f"{file} is not the shard its manifest speaks of: {found}; it was changed after it was "
        "prepared: copy it anew, or prepare the data set again"
    )


def _take(loaded: dict[str, Any], key: str, kind: Any, origin: str) -> Any:
    if key not in loaded:
        raise DataError(
            f"{origin} lacks the key {key!r}; it has {', '.join(loaded)}: it is damaged, or not "
            "a droppos manifest; prepare the data set again"
        )
    value = loaded[key]
    if not isinstance(value, kind):
        raise DataError(f"{origin}: {key} has the wrong type, got {value!r}")
    return value


def _facts_of(picture: Picture) -> bytes:
    """Give what a shard's content hash is made of."""
    return _canonical([picture.key, picture.label, hashlib.sha256(picture.image).hexdigest()])


def _canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode()
