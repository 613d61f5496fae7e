"""Storage that throttles, resets, cuts, falls silent: a real S3 server behind a failing proxy."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from time import monotonic, sleep

import pytest

from droppos.errors import DataError, StorageError
from pipelines import retries
from pipelines.local_s3 import S3Server
from pipelines.s3 import Upload
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
BUCKET = "faults"
BODY = os.urandom(100_000)
LARGE = os.urandom(12 * 2**20)
"""More than pyarrow or we send in one part here."""


@pytest.fixture(scope="module")
def running(s3: S3Server) -> Iterator[FaultProxy]:
    """The proxy, and clients less patient than a cluster's, which are made once each endpoint."""
    with fault_proxy(s3) as proxy, pytest.MonkeyPatch.context() as patch:
        proxy.server.bucket(BUCKET)
        for name, value in proxy.env.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        patch.setattr("pipelines.s3.REQUEST_TIMEOUT", 1.0)
        patch.setattr("pipelines.s3.PART", 5 * 2**20)  # S3 takes no smaller ones
        patch.setattr(retries, "FIRST_PAUSE", 0.02)
        yield proxy


@pytest.fixture
def proxy(running: FaultProxy) -> Iterator[FaultProxy]:
    running.clear()
    yield running
    running.clear()


@pytest.fixture
def place(proxy: FaultProxy) -> Place:
    """A place with an object, of which the proxy knows nothing yet."""
    place = open_place(f"s3://{BUCKET}/{os.urandom(4).hex()}")
    (place / "a").write_bytes(BODY)
    proxy.clear()
    return place


def _stored(s3: S3Server, place: Place) -> bytes:
    """What the server has, asked past the proxy."""
    return s3.client().get_object(Bucket=place.bucket, Key=place.key)["Body"].read()


def _write(place: Place) -> bytes:
    (place / "w").write_bytes(BODY[:50_000])
    return BODY[:50_000]


def _write_pieces(place: Place) -> bytes:
    with (place / "w").open_output() as file:
        for start in range(0, len(LARGE), 2**20):
            file.write(LARGE[start : start + 2**20])
    return LARGE


READS: dict[str, tuple[Callable[[Place], object], object]] = {
    "read": (lambda place: (place / "a").read_bytes(), BODY),
    "part": (lambda place: (place / "a").read(lambda file: file.read_at(9, 50)), BODY[50:59]),
    "list": (lambda place: [tuple(e) for e in place.files()], [("a", len(BODY))]),
    "size": (lambda place: (place / "a").size(), len(BODY)),
    "reach": (lambda place: place.check_reachable(), None),
}


@pytest.mark.parametrize("fault", QUICK)
@pytest.mark.parametrize("name", READS)
def test_a_read_outlasts_what_passes(
    proxy: FaultProxy, place: Place, fault: Fault, name: str
) -> None:
    act, expected = READS[name]
    before = count_retries()
    proxy.fail(fault, times=3)
    assert act(place) == expected
    assert len([r for r in proxy.requests() if r.fault]) == 3
    # A client sends again by itself, once, what is reset on a connection that was kept.
    assert 1 <= count_retries() - before <= 3


@pytest.mark.parametrize("fault", QUICK)
@pytest.mark.parametrize("write", [_write, _write_pieces])
def test_a_write_outlasts_what_passes(
    proxy: FaultProxy, place: Place, s3: S3Server, fault: Fault, write: Callable[[Place], bytes]
) -> None:
    before = count_retries()
    proxy.fail(fault, times=2, key="/w")
    expected = write(place)
    assert count_retries() - before == 2
    assert _stored(s3, place / "w") == expected


@pytest.mark.parametrize("fault", QUICK)
def test_a_deletion_outlasts_what_passes(
    proxy: FaultProxy, place: Place, s3: S3Server, fault: Fault
) -> None:
    proxy.fail(fault, key="list-type=2")
    proxy.fail(fault, method="POST")
    place.delete()
    assert len([r for r in proxy.requests() if r.fault]) == 2
    assert s3.client().list_objects_v2(Bucket=BUCKET, Prefix=place.key)["KeyCount"] == 0


def test_the_lost_answer_to_the_last_request_of_an_upload(
    proxy: FaultProxy, place: Place, s3: S3Server
) -> None:
    proxy.fail(Fault.LOST_ANSWER, times=2, method="POST", key="?uploadId=")
    _write_pieces(place)
    assert _stored(s3, place / "w") == LARGE


@pytest.mark.parametrize("completed", [True, False])
def test_an_upload_the_store_forgot_counts_if_its_object_is_there(
    place: Place, s3: S3Server, completed: bool
) -> None:
    """Some stores forget an upload with its completion, whose answer may have been lost."""
    two_parts = LARGE[: 10 * 2**20]
    (place / "w").write_bytes(two_parts if completed else b"old")
    upload = Upload(place / "w")
    upload.write(two_parts)
    key = (place / "w").key
    s3.client().abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload._id)
    with nullcontext() if completed else pytest.raises(OSError, match="NoSuchUpload"):
        upload.finish()


@pytest.mark.slow
def test_each_page_has_patience_of_its_own(proxy: FaultProxy, place: Place, s3: S3Server) -> None:
    client = s3.client()
    names = [f"{i:04d}" for i in range(1050)]
    with ThreadPoolExecutor(8) as pool:
        keys = [(place / "many" / name).key for name in names]
        list(pool.map(lambda key: client.put_object(Bucket=BUCKET, Key=key, Body=b"1"), keys))
    proxy.fail(Fault.SLOW_DOWN, times=2, key="continuation-token")
    assert [tuple(entry) for entry in (place / "many").files()] == [(name, 1) for name in names]
    assert len(proxy.requests(key="list-type=2")) == 1 + 3
    assert (place / "many").children() == names
    proxy.clear()
    proxy.fail(Fault.LOST_ANSWER, method="POST")
    (place / "many").delete()
    assert len(proxy.requests(key="list-type=2")) == 2
    assert len(proxy.requests(method="POST")) == 2 + 1
    assert place.children() == ["a"]


@pytest.mark.slow
def test_silence_and_stalled_bodies_are_ended(proxy: FaultProxy, place: Place) -> None:
    """A stall lasts 8 s here: curl takes the mean speed of some seconds before the last one."""
    others = {name: place / name for name in ("b", "c", "d")}
    for other in others.values():
        other.write_bytes(BODY)
    before = count_retries()
    proxy.fail(Fault.STALL, method="GET", key="/a")
    proxy.fail(Fault.SILENCE, method="GET", key="/b")
    proxy.fail(Fault.STALL, method="PUT", key="/c")
    proxy.fail(Fault.SILENCE, method="PUT", key="/d")
    start = monotonic()
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit((place / name).read_bytes) for name in ("a", "b")]
        writes = [pool.submit(others[name].write_bytes, BODY[:9]) for name in ("c", "d")]
    assert [read.result() for read in reads] == [BODY, BODY]
    assert [write.result() for write in writes] == [None, None]
    assert monotonic() - start < 20
    assert count_retries() - before == 4
    assert [others[name].size() for name in ("c", "d")] == [9, 9]


def test_a_hundred_reads_amid_faults_are_right(proxy: FaultProxy, place: Place) -> None:
    bodies = {f"n{i}": os.urandom(1000 * (i + 1)) for i in range(10)}
    for name, body in bodies.items():
        (place / name).write_bytes(body)
    before = count_retries()
    proxy.fail(*QUICK, times=None, probability=0.3, seed=5)
    for _ in range(10):
        for name, body in bodies.items():
            assert (place / name).read_bytes() == body
    assert count_retries() - before > 30


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET])
@pytest.mark.parametrize("name", ["read", "list", "write"])
def test_patience_ends(
    proxy: FaultProxy, place: Place, monkeypatch: pytest.MonkeyPatch, fault: Fault, name: str
) -> None:
    act = _write if name == "write" else READS[name][0]
    monkeypatch.setattr(retries, "PATIENCE", 0.5)
    proxy.fail(fault, times=None)
    start = monotonic()
    says = {Fault.SLOW_DOWN: "is overloaded", Fault.RESET: "does not answer"}[fault]
    with pytest.raises(StorageError, match=rf"{place}.*127.* {says}.*; .*tried \d+ times in \d s"):
        act(place)
    assert monotonic() - start < 10  # the patience of everyone else is two minutes
    assert 4 <= len(proxy.requests()) <= 50


def test_each_operation_is_logged_once(
    proxy: FaultProxy, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.fail(Fault.SLOW_DOWN, times=4, method="GET")
    with caplog.at_level(logging.WARNING):
        (place / "a").read_bytes()
    (record,) = [r for r in caplog.records if r.name == "pipelines.retries"]
    assert f"could not read {place}/a, trying for up to 120 s" in record.message
    assert "SLOW_DOWN" in record.message


def test_what_is_missing_is_told_at_once(proxy: FaultProxy, place: Place) -> None:
    before = count_retries()
    for act in (
        (place / "gone").read_bytes,
        (place / "gone").size,
        open_place("s3://no-such-bucket/x").read_bytes,
        lambda: open_place("s3://no-such-bucket/x").write_bytes(b""),
    ):
        proxy.clear()
        with pytest.raises(DataError, match="there is no") as told:
            act()
        assert not isinstance(told.value, StorageError)
        assert len(proxy.requests()) <= 4
    assert count_retries() == before


def test_a_closed_door_is_no_fault_of_the_data(
    proxy: FaultProxy, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    closed = open_place(place.uri)
    before = count_retries()
    for name in ("read", "list", "size", "reach"):
        proxy.clear()
        with pytest.raises(StorageError, match="access denied"):
            READS[name][0](closed)
        assert len(proxy.requests()) == 1
    with pytest.raises(StorageError, match="access denied"):
        closed.delete()
    assert count_retries() == before


@pytest.mark.parametrize("key", ["?uploads", "partNumber=2", "?uploadId="])
def test_a_write_that_fails_leaves_what_was_there(
    proxy: FaultProxy, place: Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (place / "w").write_bytes(b"old")
    monkeypatch.setattr(retries, "PATIENCE", 0.2)
    proxy.fail(Fault.SLOW_DOWN, times=None, method="PUT" if "part" in key else "POST", key=key)
    with pytest.raises(StorageError, match="cannot write"):
        _write_pieces(place)
    assert _stored(s3, place / "w") == b"old"
    pending = s3.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert [each for each in pending if each["Key"].startswith(place.key)] == []


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.CUT])
def test_an_object_that_cannot_be_written_whole_stays_as_it_was(
    proxy: FaultProxy, place: Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(retries, "PATIENCE", 0.2)
    proxy.fail(fault, times=None, key="/a")
    with pytest.raises(StorageError, match="cannot write"):
        (place / "a").write_bytes(LARGE)
    sleep(0.1)  # for the server to be done with what it was cut off from
    assert _stored(s3, place / "a") == BODY


def test_a_writer_that_raises_leaves_what_was_there(place: Place, s3: S3Server) -> None:
    with pytest.raises(ZeroDivisionError), (place / "a").open_output() as file:
        file.write(LARGE)
        raise ZeroDivisionError
    assert _stored(s3, place / "a") == BODY


def test_an_object_replaced_while_it_is_read_is_read_anew(
    proxy: FaultProxy, place: Place, s3: S3Server
) -> None:
    """pyarrow would fill up what is missing with memory as it happened to be."""
    proxy.fail(Fault.SLOW_START, method="GET", seconds=0.5)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit((place / "a").read_bytes)
        while not proxy.requests(method="GET"):
            sleep(0.01)
        s3.client().put_object(Bucket=BUCKET, Key=(place / "a").key, Body=b"short")
        assert reading.result() == b"short"
