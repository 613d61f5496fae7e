from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import tenacity.nap

from pipelines.retries import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    ShortAnswerError,
    is_passing,
    patiently,
    retries,
)

THROTTLED = "AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate."


def _failing(times: int, error: Exception):
    """Work that fails so often, then says how often it was tried."""
    tries = count(1)

    def work() -> int:
        number = next(tries)
        if number <= times:
            raise error
        return number

    return work


@pytest.mark.parametrize(
    "text",
    [
        THROTTLED,
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
        "AWS Error INTERNAL_FAILURE during GetObject operation: ",
        "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was",
        "An error occurred (SlowDown) when calling the PutObject operation (HTTP status 503)",
        "AWS Error NETWORK_CONNECTION: Read timeout on endpoint URL: http://127.0.0.1",
        "AWS Error NETWORK_CONNECTION: curlCode: 35, SSL connect error",
        "AWS Error NETWORK_CONNECTION: SSL validation failed for https://s3.amazonaws.com/b "
        "EOF occurred in violation of protocol (_ssl.c:992)",
        "An error occurred (RequestTimeout) when calling the PutObject operation: Your socket "
        "connection to the server was not read from or written to (HTTP status 400)",
    ],
)
def test_what_passes(text: str) -> None:
    assert is_passing(OSError(text))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "Path does not exist 'bucket/SLOW_DOWN'"),
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation"),
        OSError(
            "When reading 'SlowDown.jpg': AWS Error UNKNOWN (HTTP status 400) during GetObject"
        ),
        OSError("AWS Error NETWORK_CONNECTION: curlCode: 60, SSL peer certificate was not OK"),
        OSError(
            "AWS Error NETWORK_CONNECTION: SSL validation failed for https://s3.local/b [SSL: "
            "CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
        ),
        OSError(28, "No space left on device"),
        ValueError(THROTTLED),
    ],
)
def test_what_does_not_pass_is_raised_as_it_is_at_once(error: Exception) -> None:
    before = retries()
    assert not is_passing(error)
    with pytest.raises(type(error)) as raised:
        patiently("read x", _failing(9, error))
    assert raised.value is error
    assert retries() == before


def test_pauses_grow_and_are_drawn_from_zero_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", pauses.append)
    bounds = [min(FIRST_PAUSE * 2**i, LONGEST_PAUSE) for i in range(12)]
    for _ in range(50):
        assert patiently("read x", _failing(12, OSError(THROTTLED))) == 13
    shares = [pause / bound for pause, bound in zip(pauses, bounds * 50, strict=True)]
    assert all(0 <= share <= 1 for share in shares)
    assert min(shares) < 0.05
    assert max(shares) > 0.95
    assert 0.4 < sum(shares) / len(shares) < 0.6


def test_retries_of_all_threads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)
    before = retries()
    with ThreadPoolExecutor(8) as pool:
        works = [_failing(5, ShortAnswerError("short")) for _ in range(40)]
        assert set(pool.map(lambda work: patiently("read x", work), works)) == {6}
    assert retries() - before == 200


def test_the_last_error_tells_what_was_tried() -> None:
    with pytest.raises(OSError, match=r"tried 1 time in 0 s, at last: .*SLOW_DOWN") as raised:
        patiently("read x", _failing(9, OSError(THROTTLED)), patience=0)
    assert is_passing(raised.value)
