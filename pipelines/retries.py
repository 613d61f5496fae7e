"""Patience with storage: what fails in passing is tried again, for a while.

Storage throttles (503 SlowDown), resets connections, cuts bodies and falls silent, and all of
it passes. The pauses grow exponentially and are drawn from zero up (full jitter), so that a
hundred workers that were throttled together don't come back together.

Only for work that may be done twice. An error passes by what its text says: pyarrow and boto3
agree on nothing else.
"""

import logging
import re
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception,
    stop_before_delay,
    wait_random_exponential,
)

PATIENCE = 120.0
"""Seconds after which no further try is begun; one that was begun ends in its own time."""
FIRST_PAUSE = 0.2
"""Seconds of the first pause, at most; each further one may be twice as long."""
LONGEST_PAUSE = 20.0
"""Seconds that no pause exceeds."""

_PASSING = re.compile(
    r"HTTP status (408|429|500|502|503|504|509)\b"
    r"|AWS Error (SLOW_DOWN|SlowDown|THROTTLING|REQUEST_LIMIT_EXCEEDED|INTERNAL_FAILURE"
    r"|InternalError|SERVICE_UNAVAILABLE|ServiceUnavailable|NETWORK_CONNECTION|REQUEST_TIMEOUT)\b"
    r"|\(RequestTimeout\)"  # S3's own, of a connection that was silent: HTTP status 400
)
_WRONG = re.compile(
    r"curlCode: (1|3|51|58|59|60|77|83|90|91)\b"
    # A handshake that was cut (35, or EOF) is the network's.
    r"|SSL validation failed.*(CERTIFICATE_VERIFY_FAILED|[Hh]ostname|WRONG_VERSION_NUMBER)",
    re.DOTALL,
)
"""Addresses and certificates, which pyarrow and boto3 count as the network too."""

_log = logging.getLogger(__name__)
_lock = Lock()
_count = 0

Result = TypeVar("Result")


class ShortAnswerError(OSError):
    """Fewer bytes came than were asked for."""


def retries() -> int:
    """How often this process has tried something again, all threads together."""
    return _count


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment."""
    if not isinstance(error, OSError):
        return False
    if isinstance(error, ShortAnswerError):
        return True
    text = str(error)
    return bool(_PASSING.search(text)) and not _WRONG.search(text)


def patiently(what: str, work: Callable[[], Result], patience: float | None = None) -> Result:
    """Do the work, again and again while what goes wrong passes.

    Args:
        what: The work, for the log, such as "read s3://bucket/key".
        work: May be done twice.
        patience: Seconds; PATIENCE when not given.

    Raises:
        OSError: If it still failed when patience ended; the text tells how often it was tried,
            how long, and why it failed last. What does not pass is raised as it is, at once.
    """
    patience = PATIENCE if patience is None else patience

    def note(state: RetryCallState) -> None:
        global _count
        with _lock:
            _count += 1
        if state.attempt_number == 1:
            reason = state.outcome.exception() if state.outcome else None
            _log.warning("could not %s, trying for up to %.0f s: %s", what, patience, reason)

    retrying = Retrying(
        retry=retry_if_exception(is_passing),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
        stop=stop_before_delay(patience),
        before_sleep=note,
    )
    try:
        return retrying(work)
    except RetryError as error:
        last = error.last_attempt
        seconds = retrying.statistics["delay_since_first_attempt"]
        times = "1 time" if last.attempt_number == 1 else f"{last.attempt_number} times"
        raise OSError(
            f"tried {times} in {seconds:.0f} s, at last: {last.exception()}"
        ) from last.exception()
