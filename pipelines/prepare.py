"""Prepare: pictures of a folder, archive or parquet → a data set of shards.

Every picture is decoded once, here, so that no run of weeks meets one it can't read. Those are
set aside by name, with the reason. With a bound, those above it are replaced by smaller copies
(droppos/bounded.py, docs/data.md).

The job can be killed at any moment and run again. What it leaves at DEST, in this order:

    prepare.json                  what was asked, of which source
    shard-00000.parquet           a finished shard, and then
    progress/shard-00000.json     its record: where in the source the next one starts
    set_aside.jsonl
    manifest.json                 last: now it is a data set

A shard depends only on where it starts, so an interrupted job ends with the same bytes as one
that was not.

With a held-out data set, a part of the pictures goes there and nowhere else: by a hash of their
names, so that a picture stays on its side whatever else the source holds (pipelines/sides.py).
"""

import json
import logging
import os
import time
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile, zip_longest
from typing import NamedTuple

from droppos.bounded import Bound, TooLongError, bounded_copy
from droppos.errors import ConfigError, DataError
from droppos.pictures import MAX_PIXELS, upright_size
from pipelines.copies import Bounded, Saved, total
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
from pipelines.sides import HOLDOUT_SHARE, HoldoutBy, Side, sides
from pipelines.sources import Item, Source, Wanted, open_source
from pipelines.storage import Place, open_place

log = logging.getLogger(__name__)

ASKED = "prepare.json"
SET_ASIDE = "set_aside.jsonl"
PROGRESS = "progress"
READERS = 16
"""Records that are asked of storage at once."""


class SetAside(NamedTuple):
    """A file of the source that is not in the data set."""

    key: str
    """Path relative to the source."""
    kind: str
    """hidden file, not a picture, empty, undecodable or too long."""
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
    bounded: Bounded | None = None
    """How many pictures are smaller copies, and what that saved; none without a bound."""
    holdout: "PrepareReport | None" = None
    """What became of those that were put aside; none if none were asked to be."""


@dataclass(frozen=True)
class _Asked:
    """What the data set's bytes depend on. Another answer to any of these is another data set."""

    source: str
    fingerprint: str
    shard_bytes: int
    group_rows: int
    max_pixels: int = MAX_PIXELS
    short_side: int | None = None
    quality: int | None = None
    mixed: bool = False
    """Whether pictures lie mixed; an older droppos packed all in the order of their names."""
    only: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    side: str | None = None
    """Which of the pictures, in words, where some are held out; all of them without."""

    @property
    def bound(self) -> Bound | None:
        return Bound.asked(self.short_side, self.quality)


class _Checked(NamedTuple):
    """A picture that can be read."""

    picture: Picture
    original_bytes: int | None
    """Size of what it is a smaller copy of; none when it is as it was found."""


@dataclass
class _Pending:
    """What the next record will say of the shard that is being filled."""

    set_aside: list[SetAside] = field(default_factory=list)
    saved: Saved = field(default_factory=Saved)

    def note(self, checked: _Checked) -> None:
        if checked.original_bytes is not None:
            copy = Saved(1, checked.original_bytes, len(checked.picture.image))
            self.saved = total([self.saved, copy])


@dataclass(frozen=True)
class _Record:
    """A finished shard, and where the next one starts: the number of an item."""

    shard: Shard
    next: int
    set_aside: list[SetAside]
    saved: Saved


def prepare(
    source: str,
    dest: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    group_rows: int = GROUP_ROWS,
    short_side: int | None = None,
    quality: int | None = None,
    workers: int | None = None,
    wanted: Wanted = Wanted(),  # noqa: B008 (frozen)
    holdout: str | None = None,
    holdout_share: float = HOLDOUT_SHARE,
    holdout_by: HoldoutBy = "picture",
    on_progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Pack the pictures at ``source`` into a data set at ``dest``.

    Run again after an interruption, it goes on after the last finished shard; run again after
    it ended, it finds nothing to do.

    Args:
        source: Folder, .tar, .tar.gz, .zip or parquet, or a folder of those, as path or URI.
        dest: Folder of the data set, as path or URI.
        shard_bytes: Encoded bytes after which a shard is full.
        group_rows: Pictures of a row group.
        short_side: Pixels above which a picture's short side is made so long; none keeps every
            picture as it is.
        quality: JPEG quality of the copies this makes.
        workers: Threads that read and decode; by default one a core, and four a core when the
            source is on S3, where most wait.
        wanted: What of the source is read.
        holdout: Folder of another data set, of pictures that are put aside; none are without.
        holdout_share: About how many of them, in (0, 1).
        holdout_by: What is put aside together: nothing (`picture`), or what is in one folder.
        on_progress: Called with (done, total) after each picture, for each data set.

    Raises:
        ConfigError: If a setting is out of range, or one place is inside of another.
        DataError: If there is nothing to pack, a place can't be reached, or ``dest`` already
            holds another data set.
    """
    started = time.monotonic()
    for name, value in (("shard_bytes", shard_bytes), ("group_rows", group_rows)):
        if value < 1:
            raise ConfigError(f"{name} must be positive, got {value}; leave it out for the default")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be positive, got {workers}; leave it out for the default")
    bound = Bound.asked(short_side, quality)
    place, dests = open_place(source), [open_place(dest)]
    divided = sides(holdout_share, holdout_by) if holdout is not None else []
    if holdout is not None:
        dests.append(open_place(holdout))
        _refuse_nested(*dests)
    for target in dests:
        _refuse_inside(place, target)
        target.check_reachable()
    with open_source(place, wanted) as opened:
        asked = _Asked(
            opened.uri,
            opened.fingerprint,
            shard_bytes,
            group_rows,
            short_side=bound and bound.short_side,
            quality=bound and bound.quality,
            mixed=opened.mixed,
            **asdict(wanted),
        )
        threads = workers or (os.cpu_count() or 1) * (4 if place.is_s3 else 1)
        goals: list[tuple[Place, Side | None, _Asked, bool]] = []
        for target, side in zip_longest(dests, divided):
            part = asked if side is None else replace(asked, side=str(side))
            finished = (target / MANIFEST).exists()
            _begin(target, part, finished)  # of both, before pictures of one are put anywhere
            goals.append((target, side, part, finished))
        reports: list[PrepareReport] = []
        for target, side, part, finished in reversed(goals):
            if not finished:
                _pack(opened, side, target, part, _records(target), threads, on_progress)
            reports.append(_report(target, time.monotonic() - started, finished))
    whole = reports.pop()
    return replace(whole, holdout=reports.pop() if reports else None)


def _report(dest: Place, seconds: float, finished: bool) -> PrepareReport:
    manifest = load_manifest(dest)
    return PrepareReport(
        pictures=manifest.rows,
        shards=len(manifest.shards),
        bytes=manifest.size,
        set_aside=dict(Counter(entry.kind for entry in read_set_aside(dest))),
        classes=manifest.classes,
        seconds=seconds,
        nothing_to_do=finished,
        bounded=manifest.bounded,
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


def _refuse_nested(dest: Place, holdout: Place) -> None:
    one, other = f"{dest.uri}/", f"{holdout.uri}/"
    if one.startswith(other) or other.startswith(one):
        raise ConfigError(
            f"--holdout {holdout} and destination {dest} lie in one another, so one would hold the "
            "other's pictures; give two folders side by side"
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
    before = {"mixed": False} | json.loads(written.read_bytes())
    if finished and asked.mixed and not before["mixed"]:
        log.warning(
            "%s lies in the order of its pictures' names, as an older droppos packed it; where "
            "that is by class, batches are of few classes: prepare it anew at another destination",
            dest,
        )
        before["mixed"] = True
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
    if name == "mixed":
        return "an older droppos began it, in the order of names, so it cannot be gone on with"
    if name == "side":
        before, now = (value or "all pictures" for value in (before, now))
        return f"it is of {before}, now {now} is asked"
    before, now = ("none" if value is None else value for value in (before, now))
    return f"its {name} is {before}, now {now} is asked"


def _records(dest: Place) -> list[_Record]:
    """Read the records of finished shards, as far as there is one after the other."""
    folder = dest / PROGRESS
    records: list[_Record] = []
    numbered = enumerate(folder.children())
    whole = takewhile(lambda each: each[1] == f"shard-{each[0]:05d}.json", numbered)
    names = [name for _, name in whole]
    # Of a large set there are tens of thousands.
    with ThreadPoolExecutor(READERS) as pool:
        texts = list(pool.map(lambda name: (folder / name).read_bytes(), names))
    for name, text in zip(names, texts, strict=True):
        loaded = json.loads(text)
        shard = shard_from_json(loaded["shard"], str(folder / name))
        aside = [SetAside(*entry) for entry in loaded["set_aside"]]
        saved = Saved(*loaded.get("saved", Saved()))  # absent before there were copies
        records.append(_Record(shard, loaded["next"], aside, saved))
    return records


def _pack(
    source: Source,
    side: Side | None,
    dest: Place,
    asked: _Asked,
    records: list[_Record],
    threads: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Write the shards that are missing, of all or one side's pictures, and then the manifest."""
    writer = ShardWriter(
        dest,
        first=len(records),
        shard_bytes=asked.shard_bytes,
        group_rows=asked.group_rows,
    )
    position = records[-1].next if records else 0
    if records:
        log.info("going on after %d finished shards, at picture %d", len(records), position)
    bound, pending = asked.bound, _Pending()
    items = source.items_from(position)
    if side is not None:
        items = (item for item in items if side.takes(item.key))
    for item, result in _checked(items, bound, threads):
        position = item.place + 1
        if isinstance(result, SetAside):
            pending.set_aside.append(result)
        else:
            writer.add(result.picture)
            pending.note(result)
        if writer.is_full:
            records.append(_finish(writer, dest, position, pending))
            pending = _Pending()
        if on_progress is not None:
            on_progress(position, source.total)
    if not writer.is_empty:
        records.append(_finish(writer, dest, position, pending))
        pending = _Pending()
    every = [entry for record in records for entry in record.set_aside] + pending.set_aside
    tried = bool(records or every)
    if side is None or not side.held_out:  # no pictures, so on no side
        every += [SetAside(key, *reason) for key, reason in source.refused.items()]
    if not records:
        raise DataError(_nothing_left(source, None if tried else side, every))
    every.sort()
    lines = [json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in every]
    (dest / SET_ASIDE).write_bytes("".join(lines).encode())
    saved = total(record.saved for record in records)
    manifest = Manifest(
        tuple(r.shard for r in records),
        source.classes,
        len(every),
        bounded=bound and Bounded(bound.short_side, bound.quality, *saved),
    )
    (dest / MANIFEST).write_bytes(manifest.to_json().encode())


def _finish(writer: ShardWriter, dest: Place, position: int, pending: _Pending) -> _Record:
    """Write the shard, and only then its record."""
    record = _Record(writer.close_shard(), position, pending.set_aside, pending.saved)
    name = record.shard.name.replace(".parquet", ".json")
    _write_json(dest / PROGRESS / name, asdict(record))
    return record


def _checked(
    items: Iterator[Item], bound: Bound | None, threads: int
) -> Iterator[tuple[Item, _Checked | SetAside]]:
    """Read and decode items on several threads, and give them back in order.

    Threads are enough: Pillow lets go of Python's lock while it decodes, resizes and writes.
    """
    waiting: deque[tuple[Item, Future[_Checked | SetAside]]] = deque()

    def first() -> tuple[Item, _Checked | SetAside]:
        item, future = waiting.popleft()
        return item, future.result()

    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(_check, item, bound)))
                if len(waiting) > 4 * threads:  # else the whole source would be in memory
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, future in waiting:
                future.cancel()


def _check(item: Item, bound: Bound | None) -> _Checked | SetAside:
    try:
        data = item.read()
    except (zipfile.BadZipFile, zlib.error) as error:
        return SetAside(item.key, "undecodable", f"damaged in its archive: {error}")
    if not data:
        return SetAside(item.key, "empty", "there are no bytes")
    try:
        if bound is None:
            return _Checked(Picture(data, item.key, item.label, *upright_size(data)), None)
        copy = bounded_copy(data, bound)
    except TooLongError as error:
        return SetAside(item.key, "too long", str(error))
    except DataError as error:
        return SetAside(item.key, "undecodable", str(error))
    picture = Picture(copy.image, item.key, item.label, copy.width, copy.height)
    return _Checked(picture, len(data) if copy.is_smaller else None)


def _nothing_left(source: Source, side: Side | None, aside: list[SetAside]) -> str:
    if side is not None:
        return (
            f"of the {source.total:,} pictures of source {source.uri} there is none for {side}; "
            "give another --holdout-share, or --holdout-by picture"
        )
    first = "; ".join(f"{entry.key}: {entry.reason}" for entry in aside[:3])
    return (
        f"source {source.uri} has no picture that can be decoded: all {len(aside)} files were set "
        f"aside ({first}); give a folder with pictures in it"
    )


def _write_json(place: Place, value: object) -> None:
    place.write_bytes((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
