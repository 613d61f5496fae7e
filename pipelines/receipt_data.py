"""The data that a receipt names, looked at again: its manifest, and the pictures in every shard."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

from droppos.errors import DataError, StorageError
from pipelines.check import Check
from pipelines.facts import data_changes, data_facts
from pipelines.receipt import Receipt
from pipelines.shards import Manifest, Shard, load_manifest, rehash, shard_from_json
from pipelines.storage import Place, open_place

READERS = 2
"""Shards in memory at once."""


def data_checks(told: Receipt, data: str, read_shards: bool) -> Iterator[Check]:
    """Compare a data set with what a receipt tells of it.

    Args:
        told: What the receipt tells.
        data: Prepared data set.
        read_shards: Read all of it, and hash it again.
    """
    if "shards" in told and told["facts"] is not None:  # older droppos kept no classes
        yield _listed(told)
    try:
        place = open_place(data)
        if not place.exists():
            yield Check("data", "not reachable", f"there is no {data}; name it with --data")
            return
        manifest = load_manifest(place)
    except StorageError as error:
        yield Check("data", "not reachable", str(error))
        return
    except DataError as error:
        yield Check("data", "differs", str(error))
        return
    if manifest.digest != told["manifest"]:
        words = "; ".join(data_changes(told["facts"], data_facts(manifest)))
        yield Check("data, its manifest", "differs", f"{data}: {words}")
        yield from _other_shards(told, manifest)
        return
    yield Check("data, its manifest", "ok", f"{manifest.rows:,} pictures, digest as trained on")
    if read_shards:
        yield from _shards(told, place, manifest)
    else:
        yield Check("data, its shards", "not reachable", "not read, as --no-shards asks")


def _listed(told: Receipt) -> Check:
    """Look whether the shards that the receipt lists make the digest that it names."""
    what, classes = "shards in the receipt", told["facts"]["classes"]
    try:
        shards = tuple(shard_from_json(shard, "the receipt") for shard in told["shards"])
    except DataError as error:
        return Check(what, "differs", str(error))
    listed = Manifest(
        shards=shards,
        classes=None if classes is None else tuple(classes),
        schema_version=told["schema_version"],
    )
    if listed.digest == told["manifest"]:
        return Check(what, "ok", f"{len(listed.shards):,} in all; they make the digest")
    return Check(what, "differs", f"expected {told['manifest']}, they make {listed.digest}")


def _other_shards(told: Receipt, manifest: Manifest) -> Iterator[Check]:
    """Name the shards in which a data set is another, where that can be said."""
    listed = told.get("shards", [])
    if len(listed) != len(manifest.shards):
        return
    for ours, theirs in zip(listed, manifest.shards, strict=True):
        if ours["content"] != theirs.content:
            words = f"content: expected {ours['content']}, found {theirs.content}"
            yield Check(f"data, {theirs.name}", "differs", words)


def _shards(told: Receipt, place: Place, manifest: Manifest) -> Iterator[Check]:
    """Hash the pictures of every shard again, and its file."""
    listed = [shard["sha256"] for shard in told.get("shards", [])]
    pairs = zip_longest(manifest.shards, listed[: len(manifest.shards)])
    with ThreadPoolExecutor(READERS) as pool:
        found = [check for check in pool.map(lambda pair: _shard(place, *pair), pairs) if check]
    words = f"{len(manifest.shards):,} in all, {manifest.size / 1e6:,.1f} MB, hashed again"
    yield from found or [Check("data, its shards", "ok", words)]


def _shard(place: Place, shard: Shard, sha256: str | None) -> Check | None:
    """Hash one shard again; nothing is told if it is what the receipt says."""
    what = f"data, {shard.name}"
    try:
        found = rehash(place / shard.name)
    except StorageError as error:
        return Check(what, "not reachable", str(error))
    except DataError as error:
        return Check(what, "differs", str(error))
    if found.content != shard.content:
        return Check(what, "differs", f"content: expected {shard.content}, found {found.content}")
    if found.row_groups != shard.row_groups:
        words = f"row groups: expected {shard.row_groups}, found {found.row_groups}"
        return Check(what, "differs", words)
    if sha256 is not None and found.sha256 != sha256:
        return Check(what, "note", "the same pictures in another file than the receipt lists")
    return None
