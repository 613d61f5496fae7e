"""Shards on storage that fails, and shards that are no longer what they were."""

import os
from collections.abc import Iterator

import pytest

from droppos.errors import DataError, StorageError
from pipelines import retries
from pipelines.local_s3 import S3Server
from pipelines.shards import Picture, Shard, ShardWriter, read_row_group
from pipelines.storage import Place, open_place
from pipelines.storage import retries as count_retries
from tests.fault_proxy import Fault, FaultProxy, fault_proxy

QUICK = [
    Fault.SLOW_DOWN,
    Fault.INTERNAL_ERROR,
    Fault.BAD_GATEWAY,
    Fault.RESET,
    Fault.LOST_ANSWER,
    Fault.CUT,
]


@pytest.fixture(scope="module")
def running(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3) as proxy, pytest.MonkeyPatch.context() as patch:
        proxy.server.bucket("shard-faults")
        for name, value in proxy.env.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        patch.setattr(retries, "FIRST_PAUSE", 0.02)
        yield proxy


@pytest.fixture
def proxy(running: FaultProxy) -> Iterator[FaultProxy]:
    running.clear()
    yield running
    running.clear()


@pytest.fixture
def place(proxy: FaultProxy) -> Place:
    return open_place(f"s3://shard-faults/{os.urandom(4).hex()}")


@pytest.fixture
def shard(proxy: FaultProxy, place: Place) -> Shard:
    """Three row groups, which nobody in this process has read."""
    writer = ShardWriter(place, group_rows=4)
    for i in range(12):
        writer.add(Picture(os.urandom(20_000), f"{i:03d}.jpg", None, 8, 6))
    shard = writer.close_shard()
    proxy.clear()
    return shard


def _keys(place: Place, shard: Shard, group: int) -> list[str]:
    return read_row_group(place, shard, group)["key"].to_pylist()


@pytest.mark.parametrize("fault", QUICK)
@pytest.mark.parametrize("known", [False, True])
def test_a_row_group_outlasts_what_passes(
    proxy: FaultProxy, place: Place, shard: Shard, fault: Fault, known: bool
) -> None:
    if known:
        _keys(place, shard, 0)
    before = count_retries()
    proxy.fail(fault, times=3)
    assert _keys(place, shard, 1) == ["004.jpg", "005.jpg", "006.jpg", "007.jpg"]
    assert len([r for r in proxy.requests() if r.fault]) == 3
    assert count_retries() > before


@pytest.mark.slow
def test_a_slow_first_byte_is_no_failure(proxy: FaultProxy, place: Place, shard: Shard) -> None:
    """Of the seconds there are in earnest; three would be the client's default."""
    before = count_retries()
    proxy.fail(Fault.SLOW_START, method="GET", seconds=4.5)
    assert _keys(place, shard, 0)[0] == "000.jpg"
    assert count_retries() == before


def test_what_fails_beyond_patience_says_nothing_of_the_shard(
    proxy: FaultProxy, place: Place, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PATIENCE", 0.2)
    for method in ("HEAD", "GET"):
        proxy.fail(Fault.SLOW_DOWN, times=None, method=method)
        with pytest.raises(StorageError, match=rf"cannot read {place}/shard-0.*tried \d"):
            _keys(place, shard, 0)
        proxy.clear()
    assert _keys(place, shard, 2)[0] == "008.jpg"
    proxy.fail(Fault.CUT, times=None, method="GET")
    with pytest.raises(StorageError, match="cannot read"):
        _keys(place, shard, 0)
    proxy.clear()
    assert _keys(place, shard, 0)[0] == "000.jpg"


@pytest.mark.parametrize("known", [False, True])
def test_a_shard_that_vanished_is_told_at_once(
    proxy: FaultProxy, place: Place, shard: Shard, known: bool
) -> None:
    if known:
        _keys(place, shard, 0)
    (place / shard.name).delete()
    before = count_retries()
    proxy.clear()
    with pytest.raises(DataError, match=f"{shard.name}: there is no such object") as told:
        _keys(place, shard, 1)
    assert not isinstance(told.value, StorageError)
    assert len(proxy.requests()) <= 3
    assert count_retries() == before


@pytest.mark.parametrize("known", [False, True])
def test_a_truncated_shard_is_damaged(
    proxy: FaultProxy, place: Place, shard: Shard, known: bool
) -> None:
    whole = (place / shard.name).read_bytes()
    if known:
        _keys(place, shard, 0)
    (place / shard.name).write_bytes(whole[: shard.bytes // 2])
    proxy.clear()
    with pytest.raises(DataError, match="is not the shard its manifest speaks of") as told:
        _keys(place, shard, 2)
    assert not isinstance(told.value, StorageError)
    assert len(proxy.requests()) <= 3
    (place / shard.name).write_bytes(whole)
    assert _keys(place, shard, 2)[0] == "008.jpg"


def test_a_closed_door_says_nothing_of_the_shard(
    proxy: FaultProxy, place: Place, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="access denied"):
        _keys(open_place(place.uri), shard, 0)
