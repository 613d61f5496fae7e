"""Prepare: pictures of a folder, archive or parquet → a data set of shards.

Every picture is decoded once, here, so that no run of weeks meets one it can't read. Those are
set aside by name, with the reason.

The job can be killed at any moment and run again. What it leaves at DEST, in this order:

    prepare.json                  what was asked, of which source
    shard-00000.parquet           a finished shard, and then
    progress/shard-00000.json     its record: where in the source the next one starts
    set_aside.jsonl
    manifest.json                 last: now it is a data set

A shard depends only on where it starts, so an interrupted job ends with the same bytes as one
that was not.
"""

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from droppos.errors import ConfigError, DataError
from droppos.pictures import MAX_PIXELS, upright_size
from pipelines.shards import (
    GROUP_ROWS,
    MANIFEST,
    SHARD_BYTES,
    Manifest,
    Picture,
    Shard,
    ShardWriter,
    load_manifest,
    shard_from_json,
)
from pipelines.sources import Item, Source, open_source
from pipelines.storage import Place, open_place

log = logging.getLogger(__name__)

ASKED = "prepare.json"
SET_ASIDE = "set_aside.jsonl"
PROGRESS = "progress"


class SetAside(NamedTuple):
    """A file of the source that is not in the data set."""

    key: str
    """Path relative to the source."""
    kind: str
    """hidden file, not a picture, empty or undecodable."""
    reason: str
    """What exactly was wrong."""


@dataclass(frozen=True)
class PrepareReport:
    """What became of the source."""

    pictures: int
    """Pictures in the data set."""
    shards: int
    """Files they are in."""
    bytes: int
    """Size of those files."""
    set_aside: dict[str, int]
    """Files that are not in the data set, by kind."""
    classes: tuple[str, ...] | None
    """Name of each label; none without labels."""
    seconds: float
    """Wall time of this call."""
    nothing_to_do: bool
    """Whether the data set was there before."""


@dataclass(frozen=True)
class _Asked:
    """What the data set's bytes depend on. Another answer to any of these is another data set."""

    source: str
    fingerprint: str
    shard_bytes: int
    group_rows: int
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class _Record:
    """A finished shard, and where the next one starts."""

    shard: Shard
    next: int
    set_aside: list[SetAside] = field(default_factory=list)


def prepare(
    source: str,
    dest: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    group_rows: int = GROUP_ROWS,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Pack the pictures at ``source`` into a data set at ``dest``.

    Run again after an interruption, it goes on after the last finished shard; run again after
    it ended, it finds nothing to do.

    Args:
        source: Folder, .tar, .tar.gz, .zip or parquet, as path or URI.
        dest: Folder of the data set, as path or URI.
        shard_bytes: Encoded bytes after which a shard is full.
        group_rows: Pictures of a row group.
        workers: Threads that read and decode; by default one a core, and four a core when the
            source is on S3, where most wait.
        on_progress: Called with (done, total) after each picture.

    Raises:
        ConfigError: If a setting is out of range, or ``dest`` is inside of ``source``.
        DataError: If there is nothing to pack, a place can't be reached, or ``dest`` already
            holds another data set.
    """
    started = time.monotonic()
    for name, value in (("shard_bytes", shard_bytes), ("group_rows", group_rows)):
        if value < 1:
            raise ConfigError(f"{name} must be positive, got {value}; leave it out for the default")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be positive, got {workers}; leave it out for the default")
    place, target = open_place(source), open_place(dest)
    _refuse_inside(place, target)
    target.check_reachable()
    with open_source(place) as opened:
        asked = _Asked(opened.uri, opened.fingerprint, shard_bytes, group_rows)
        finished = (target / MANIFEST).exists()
        _begin(target, asked, finished)
        if not finished:
            records = _records(target)
            threads = workers or (os.cpu_count() or 1) * (4 if place.is_s3 else 1)
            _pack(opened, target, asked, records, threads, on_progress)
    manifest = load_manifest(target)
    return PrepareReport(
        pictures=manifest.rows,
        shards=len(manifest.shards),
        bytes=manifest.size,
        set_aside=dict(Counter(entry.kind for entry in read_set_aside(target))),
        classes=manifest.classes,
        seconds=time.monotonic() - started,
        nothing_to_do=finished,
    )


def read_set_aside(place: Place) -> list[SetAside]:
    """Read what was left out of the data set at ``place``, in the order of the keys."""
    lines = (place / SET_ASIDE).read_bytes().splitlines()
    return [SetAside(**json.loads(line)) for line in lines]


def _refuse_inside(source: Place, dest: Place) -> None:
    if f"{dest.uri}/".startswith(f"{source.uri}/"):
        raise ConfigError(
            f"destination {dest} is inside of source {source}, so shards would be taken for "
            "pictures; give a destination elsewhere"
        )


def _begin(dest: Place, asked: _Asked, finished: bool) -> None:
    """Note what is asked, unless shards of something else are there: they are not mixed."""
    written = dest / ASKED
    if not written.exists():
        if finished:
            raise DataError(
                f"{dest} holds a data set without {ASKED}, so what it was made from is unknown; "
                "choose another destination"
            )
        _write_json(written, asdict(asked))
        return
    before = json.loads(written.read_bytes())
    different = {k: v for k, v in asdict(asked).items() if before.get(k) != v}
    if not different:
        return
    shards = len((dest / PROGRESS).children())
    if finished or shards:
        told = "; ".join(_difference(k, before.get(k), v) for k, v in different.items())
        raise DataError(
            f"{dest} already holds {shards} shards of another data set: {told}; delete it, "
            "choose another destination, or ask for the same again"
        )
    _write_json(written, asdict(asked))


def _difference(name: str, before: object, now: object) -> str:
    if name == "fingerprint":
        return "names or sizes of the source's files have changed since"
    return f"its {name} is {before}, now {now} is asked"


def _records(dest: Place) -> list[_Record]:
    """Read the records of finished shards, as far as there is one after the other."""
    folder = dest / PROGRESS
    records: list[_Record] = []
    for number, name in enumerate(folder.children()):
        if name != f"shard-{number:05d}.json":
            break
        loaded = json.loads((folder / name).read_bytes())
        shard = shard_from_json(loaded["shard"], str(folder / name))
        aside = [SetAside(*entry) for entry in loaded["set_aside"]]
        records.append(_Record(shard, loaded["next"], aside))
    return records


def _pack(
    source: Source,
    dest: Place,
    asked: _Asked,
    records: list[_Record],
    threads: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Write the shards that are missing, and then the manifest."""
    writer = ShardWriter(
        dest,
        first=len(records),
        shard_bytes=asked.shard_bytes,
        group_rows=asked.group_rows,
    )
    position = records[-1].next if records else 0
    if records:
        log.info("going on after %d finished shards, at picture %d", len(records), position)
    aside: list[SetAside] = []
    for result in _checked(source.items_from(position), threads):
        position += 1
        if isinstance(result, Picture):
            writer.add(result)
        else:
            aside.append(result)
        if writer.is_full:
            records.append(_finish(writer, dest, position, aside))
            aside = []
        if on_progress is not None:
            on_progress(position, source.total)
    if not writer.is_empty:
        records.append(_finish(writer, dest, position, aside))
        aside = []
    every = [entry for record in records for entry in record.set_aside] + aside
    every += [SetAside(key, *reason) for key, reason in source.refused.items()]
    if not records:
        raise DataError(_nothing_left(source, every))
    every.sort()
    lines = [json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in every]
    (dest / SET_ASIDE).write_bytes("".join(lines).encode())
    manifest = Manifest(tuple(r.shard for r in records), source.classes, len(every))
    (dest / MANIFEST).write_bytes(manifest.to_json().encode())


def _finish(writer: ShardWriter, dest: Place, position: int, aside: list[SetAside]) -> _Record:
    """Write the shard, and only then its record."""
    record = _Record(writer.close_shard(), position, aside)
    name = record.shard.name.replace(".parquet", ".json")
    _write_json(dest / PROGRESS / name, asdict(record))
    return record


def _checked(items: Iterator[Item], threads: int) -> Iterator[Picture | SetAside]:
    """Read and decode items on several threads, and give them back in order.

    Threads are enough: Pillow lets go of Python's lock while it decodes.
    """
    waiting: deque[Future[Picture | SetAside]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(_check, item))
                if len(waiting) > 4 * threads:  # else the whole source would be in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _check(item: Item) -> Picture | SetAside:
    data = item.read()
    if not data:
        return SetAside(item.key, "empty", "there are no bytes")
    try:
        width, height = upright_size(data)
    except DataError as error:
        return SetAside(item.key, "undecodable", str(error))
    return Picture(data, item.key, item.label, width, height)


def _nothing_left(source: Source, aside: list[SetAside]) -> str:
    first = "; ".join(f"{entry.key}: {entry.reason}" for entry in aside[:3])
    return (
        f"source {source.uri} has no picture that can be decoded: all {len(aside)} files were set "
        f"aside ({first}); give a folder with pictures in it"
    )


def _write_json(place: Place, value: object) -> None:
    place.write_bytes((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
