"""The proxy does what its script says: other tests trust it."""

import os
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError

from pipelines.local_s3 import S3Server
from tests.fault_proxy import Fault, FaultProxy, fault_proxy

BODY = os.urandom(300_000)


@pytest.fixture(scope="module")
def running(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3) as proxy:
        proxy.server.bucket("proxied")
        yield proxy


@pytest.fixture
def proxy(running: FaultProxy) -> FaultProxy:
    running.clear()
    running.server.client().put_object(Bucket="proxied", Key="a b/c", Body=BODY)
    running.clear()
    return running


def _client(proxy: FaultProxy) -> Any:
    config = Config(read_timeout=0.5, retries={"total_max_attempts": 1})
    return boto3.client("s3", endpoint_url=proxy.server.endpoint, config=config)


def _get(client: Any) -> bytes:
    return client.get_object(Bucket="proxied", Key="a b/c")["Body"].read()


def test_bytes_pass_and_are_counted(proxy: FaultProxy) -> None:
    client = proxy.server.client()
    for _ in range(3):
        assert _get(client) == BODY
    got = client.get_object(Bucket="proxied", Key="a b/c", Range="bytes=10-19")["Body"].read()
    assert got == BODY[10:20]
    client.put_object(Bucket="proxied", Key="new", Body=b"12345")
    names = [each["Key"] for each in client.list_objects_v2(Bucket="proxied")["Contents"]]
    assert names == ["a b/c", "new"]
    gets = proxy.requests(method="GET", key="proxied/a b/c")
    assert [each.sent for each in gets] == [len(BODY)] * 3 + [10]
    assert [each.range for each in gets] == [None] * 3 + ["bytes=10-19"]
    assert proxy.bytes_read(key="a b/c") == 3 * len(BODY) + 10
    assert 5 <= proxy.bytes_written(key="new") < 200  # boto3 may frame it, for a checksum
    assert len(proxy.requests(method="GET", key="list-type=2")) == 1
    assert {each.status for each in proxy.requests()} == {200, 206}


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (Fault.SLOW_DOWN, ClientError, "SlowDown"),
        (Fault.INTERNAL_ERROR, ClientError, "InternalError"),
        (Fault.BAD_GATEWAY, ClientError, "502"),
        (Fault.RESET, ConnectionClosedError, "closed"),
        (Fault.LOST_ANSWER, ConnectionClosedError, "closed"),
        (Fault.SILENCE, ReadTimeoutError, "timeout"),
        (Fault.SLOW_START, ReadTimeoutError, "timeout"),
    ],
)
def test_a_fault_befalls_as_many_as_scripted(
    proxy: FaultProxy,
    s3_env: S3Server,
    fault: Fault,
    error: type[Exception],
    says: str,
) -> None:
    client = _client(proxy)
    proxy.fail(fault, times=2, method="GET", key="a b/c", seconds=0.7)
    client.list_objects_v2(Bucket="proxied")
    for _ in range(2):
        with pytest.raises(error, match=f"(?i){says}"):
            _get(client)
    assert _get(client) == BODY
    assert [r.fault for r in proxy.requests(key="a b/c")] == [fault, fault, None]


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.STALL])
def test_half_a_body_comes(proxy: FaultProxy, s3_env: S3Server, fault: Fault) -> None:
    proxy.fail(fault, method="GET")
    body = _client(proxy).get_object(Bucket="proxied", Key="a b/c")["Body"]
    got = body.read(1000)
    with pytest.raises(Exception, match=r"(?i)reset|timed out|timeout"):
        body.read()
    assert got == BODY[:1000]
    assert proxy.bytes_read() == len(BODY) // 2


@pytest.mark.parametrize(
    ("fault", "there"), [(Fault.RESET, False), (Fault.CUT, False), (Fault.LOST_ANSWER, True)]
)
def test_the_server_sees_what_the_fault_lets_through(
    proxy: FaultProxy, s3_env: S3Server, s3: S3Server, fault: Fault, there: bool
) -> None:
    proxy.fail(fault, method="PUT")
    key = f"through-{fault.name}"
    with pytest.raises(ConnectionClosedError):
        _client(proxy).put_object(Bucket="proxied", Key=key, Body=BODY)
    listed = s3.client().list_objects_v2(Bucket="proxied", Prefix=key)
    assert [each["Key"] for each in listed.get("Contents", [])] == [key] * there


def test_a_probability_is_seeded(proxy: FaultProxy, s3_env: S3Server) -> None:
    def pattern(seed: int) -> list[Fault | None]:
        proxy.clear()
        proxy.fail(Fault.SLOW_DOWN, Fault.INTERNAL_ERROR, times=None, probability=0.5, seed=seed)
        client = _client(proxy)
        for _ in range(20):
            _quiet(lambda: _get(client))
        return [each.fault for each in proxy.requests()]

    first = pattern(1)
    assert first == pattern(1) != pattern(2)
    assert set(first) == {None, Fault.SLOW_DOWN, Fault.INTERNAL_ERROR}


def _quiet(work: Callable[[], object]) -> None:
    try:
        work()
    except ClientError:
        return


@pytest.mark.slow
def test_it_is_quick(proxy: FaultProxy, s3: S3Server) -> None:
    def seconds(server: S3Server) -> float:
        client = server.client()
        start = monotonic()
        for _ in range(50):
            _get(client)
        return monotonic() - start

    straight = min(seconds(s3) for _ in range(3))
    proxied = min(seconds(proxy.server) for _ in range(3))
    assert proxied - straight < 50 * 0.005
