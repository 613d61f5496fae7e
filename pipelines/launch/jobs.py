"""Jobs of a cluster, over Ray's jobs API: submit, find again, follow, stop.

A launch's first job is called as the launch, the next ones NAME-2, NAME-3: Ray refuses a name that
was there before, so no job is ever submitted twice, whoever tries. Whose a job is, its metadata
say, by which another laptop finds it: a name like NAME-2 anybody may give.

The API serves a job's output from its first character each time it is asked for. So what was shown
is a count of characters; after the line broke, that many are passed over, and nothing is shown
twice or lost.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, cast

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from droppos.errors import ConfigError
from pipelines.launch.backend import Address
from pipelines.launch.check import Wrong
from pipelines.launch.errors import LaunchError, LineLostError, TakenError

CONNECT_S, ANSWER_S, SEND_S = 10.0, 20.0, 300.0
"""Seconds for a connection, for an answer, and for one to what sends megabytes."""
QUIET_S = 15.0
"""Seconds without output after which it is asked whether the line still holds."""
STALE_S = 300.0
"""Seconds without output after which it is read anew: a connection can be dead in one direction."""
ENDED_S = 10.0
"""The same once the job has ended: the API ends its output two seconds later."""
PATIENCE_S = 900.0
"""Seconds that a broken line is tried again. A laptop's sleep does not count: its clock stands."""
LOOK_S = 20.0
"""Seconds that the API of a cluster has which has stood before, or is to be ended anyway."""
KEPT_S = 20.0
"""Seconds that a cluster that was kept has to tell of its jobs."""
NO_CLUSTER = "none, as there is no cluster yet"
RETRY_S = 2.0
TRIES = 5
"""Of a submission."""
LAUNCH = "droppos_launch"
"""Metadata of a job: name of the launch that it is of."""
MARK = "droppos_mark"
"""Metadata by which who submitted a job knows it again."""
INTERRUPTED = 130
"""Exit code of a job that was asked to stop and did so, as of any program after Ctrl-C."""
STOP_S = 600
"""Seconds that a job has for its last checkpoint; Ray's own are 3."""


# Which set themselves to tell of each upload and each websocket.
for _told in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_told).setLevel(logging.WARNING)


class End(Enum):
    """How a job ended; the exit code of who followed it."""

    FINISHED = 0
    FAILED = 1
    STOPPED = 130

    @property
    def code(self) -> int:
        """For the shell."""
        return self.value


@dataclass(frozen=True, slots=True)
class Submission:
    """What is handed over."""

    entrypoint: str
    working_dir: Path
    """A zip."""
    env: Mapping[str, str]
    """Variables of the job and of all its tasks; no secrets, for Ray shows them."""
    metadata: Mapping[str, str]
    """LAUNCH and MARK, and what else people see beside the job."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job that is there."""

    id: str
    status: JobStatus
    metadata: Mapping[str, str]
    exit_code: int | None
    message: str

    @classmethod
    def of(cls, details: JobDetails) -> "Job":
        """Take what matters of Ray's record."""
        return cls(
            details.submission_id or "",
            details.status,
            details.metadata or {},
            details.driver_exit_code,
            details.message or "",
        )

    @property
    def running(self) -> bool:
        """Whether it may still do something."""
        return not self.status.is_terminal()

    @property
    def end(self) -> End:
        """How it ended."""
        if self.status == JobStatus.SUCCEEDED:
            return End.FINISHED
        stopped = self.status == JobStatus.STOPPED or self.exit_code == INTERRUPTED
        return End.STOPPED if stopped else End.FAILED


class _RefusedError(LaunchError):
    """The API answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        # A server's text ends with a traceback's last line, which is the one that says it.
        said = (text.strip().splitlines() or ["nothing"])[-1]
        super().__init__(f"the cluster's jobs API answered {status}: {said[:500]}")
        self.status = status
        self.is_taken = "already exists" in text


class _Client(JobSubmissionClient):
    """Ray's client, whose requests end: without a limit one hangs for ever on a dead line."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", (CONNECT_S, ANSWER_S if method == "GET" else SEND_S))
        return super()._do_request(method, endpoint, **kwargs)

    def _raise_error(self, r: requests.Response) -> NoReturn:
        raise _RefusedError(r.status_code, r.text)


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: Address) -> None:
        """Connect.

        Raises:
            LineLostError: If nothing answers.
            ConfigError: If it lets nobody in with this token.
        """
        self._address = address
        with _answers(address), _without_ray_address():
            self._client = _Client(address.url, headers=dict(address.headers))

    def submit(self, job_id: str, submission: Submission) -> None:
        """Hand a job over.

        Raises:
            TakenError: If there is one of this name.
            LineLostError: If the line broke. The job may have been taken: look for it.
        """
        try:
            with _answers(self._address):
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=job_id,
                    runtime_env={
                        "working_dir": str(submission.working_dir),
                        "env_vars": {**submission.env, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
                    },
                    metadata=dict(submission.metadata),
                )
        except _RefusedError as refused:
            if refused.is_taken:
                raise TakenError(
                    f"the cluster has a job {job_id} already, so this one was not submitted; "
                    f"`droppos attach` follows it"
                ) from refused
            raise

    def all(self) -> list[Job]:
        """List the jobs that were submitted, whoever did so."""
        with _answers(self._address):
            return [Job.of(each) for each in self._client.list_jobs() if each.submission_id]

    def of(self, name: str) -> list[Job]:
        """List the jobs of a launch."""
        return [job for job in self.all() if job.metadata.get(LAUNCH) == name]

    def running(self) -> list[str]:
        """Name all jobs that may still do something, whoever submitted them."""
        with _answers(self._address):
            there = self._client.list_jobs()
        return [
            each.submission_id or each.job_id or "one without a name"
            for each in there
            if not each.status.is_terminal()
        ]

    def newest(self, name: str) -> Job | None:
        """Find the last job of a launch."""
        return max(self.of(name), key=lambda job: _turn(name, job.id), default=None)

    def marked(self, mark: str | None) -> Job | None:
        """Find a job by its mark."""
        if mark is None:
            return None
        return next((job for job in self.all() if job.metadata.get(MARK) == mark), None)

    def next_id(self, name: str) -> str:
        """Name the launch's next job.

        Raises:
            TakenError: If one of its jobs is still running.
        """
        there = self.all()
        ours = [job for job in there if job.metadata.get(LAUNCH) == name]
        if running := [job.id for job in ours if job.running]:
            raise TakenError(
                f"the job {', '.join(running)} is still running there, so no second one is "
                f"submitted; `droppos attach {name}` follows it, `droppos stop {name}` ends it"
            )
        taken = {job.id for job in there}
        last = max((_turn(name, job.id) for job in ours), default=0)
        return next(free for turn in count(last + 1) if (free := name_of(name, turn)) not in taken)

    def get(self, job_id: str) -> Job:
        """Look at a job."""
        with _answers(self._address):
            return Job.of(self._client.get_job_info(job_id))

    def stop(self, job_id: str) -> None:
        """Send it SIGTERM; pretrain and search then save and end. Nothing if it has ended."""
        with _answers(self._address):
            self._client.stop_job(job_id)

    async def output(self, job_id: str) -> AsyncIterator[str]:
        """Yield its output from the first character on, until it has ended.

        Raises:
            LineLostError: If the line broke, or seems to be dead.
        """
        with _answers(self._address):
            # Ray's own annotation says a coroutine; it is a generator.
            pieces = cast(AsyncGenerator[str], self._client.tail_job_logs(job_id))
            quiet_since = time.monotonic()
            piece = asyncio.ensure_future(anext(pieces))
            try:
                while True:
                    if (await asyncio.wait({piece}, timeout=QUIET_S))[0]:
                        yield piece.result()
                        piece = asyncio.ensure_future(anext(pieces))
                        quiet_since = time.monotonic()
                        continue
                    running = (await asyncio.to_thread(self.get, job_id)).running
                    quiet = time.monotonic() - quiet_since
                    if quiet > (STALE_S if running else ENDED_S):
                        raise LineLostError(f"nothing was heard for {quiet:.0f} s")
            except StopAsyncIteration:
                return
            finally:
                piece.cancel()
                await asyncio.wait({piece})
                await pieces.aclose()  # its connection is closed now, not when it is collected


def follow(
    address: Address, job_id: str, show: Callable[[str], None], say: Callable[[str], None]
) -> Job:
    """Show a job's output until it has ended, over however many lines that takes.

    Args:
        address: Of the jobs API.
        job_id: The job.
        show: Gets its output, each character once.
        say: Told of a line that broke, and of its return.

    Returns:
        The job, ended.

    Raises:
        LineLostError: If the line stayed broken for PATIENCE_S.
    """
    shown = 0
    broken_since: float | None = None

    async def read(jobs: Jobs) -> None:
        nonlocal shown, broken_since
        passed_over = 0
        async for text in jobs.output(job_id):
            known = min(shown - passed_over, len(text))
            passed_over += known
            if broken_since is not None:
                say("the line is back")
                broken_since = None
            if new := text[known:]:
                show(new)
                shown += len(new)
                passed_over += len(new)

    while True:
        try:
            jobs = Jobs(address)
            asyncio.run(read(jobs))
            if not (job := jobs.get(job_id)).running:
                return job
            raise LineLostError("the output ended before the job did")
        except LineLostError as error:
            now = time.monotonic()
            if broken_since is None:
                broken_since = now
                say(f"the line to the cluster broke, the job goes on; trying again ({error})")
            if now - broken_since > PATIENCE_S:
                raise
            time.sleep(RETRY_S)


def hand_over(address: Address, job_id: str, submission: Submission) -> None:
    """Submit a job exactly once, whatever becomes of the line meanwhile.

    Args:
        address: Of the jobs API.
        job_id: Name of the job.
        submission: The job, with a MARK that no other has.

    Raises:
        TakenError: If somebody else has submitted one of this name.
        LineLostError: If the line stayed broken.
    """
    for tries_left in reversed(range(TRIES)):
        jobs = ready(address, PATIENCE_S)
        try:
            return jobs.submit(job_id, submission)
        except LineLostError:
            if not tries_left:
                raise
        except TakenError:
            # The request before may have arrived, and only its answer was lost.
            if jobs.get(job_id).metadata.get(MARK) != submission.metadata[MARK]:
                raise
            return None
        time.sleep(RETRY_S)
    return None


def ready(
    address: Address, patience_s: float, say: Callable[[str], None] = lambda text: None
) -> Jobs:
    """Wait until the jobs API answers.

    Args:
        address: Of the jobs API.
        patience_s: Seconds that it has.
        say: Told when it does not answer at once.

    Raises:
        LineLostError: If it has not after that.
    """
    until = time.monotonic() + patience_s
    told = False
    while True:
        try:
            return Jobs(address)
        except LineLostError as error:
            if time.monotonic() > until:
                raise
            if not told:
                say(f"the jobs API does not answer ({error}); tried again for {patience_s:.0f} s")
                told = True
            time.sleep(RETRY_S)


def check_idle(way: AbstractContextManager[Address], name: str) -> str:
    """See that nothing runs on a cluster that was kept, for it may end with the next launch.

    Raises:
        Wrong: If something does, or cannot be asked for.
    """
    try:
        with way as address:
            running = ready(address, KEPT_S).running()
    except LaunchError as error:
        raise Wrong(
            f"the kept cluster does not tell of its jobs: {error}",
            "one that can be used again",
            f"`droppos down {name}` ends it, and a new one is launched",
        ) from error
    if running:
        raise Wrong(
            f"{', '.join(running)}, still running on the cluster that was kept",
            "none",
            f"`droppos attach {name}` follows {name}'s; wait for it, or take another --name",
        )
    return "none runs on the cluster that was kept"


def name_of(name: str, turn: int) -> str:
    """Name a launch's job: its first is called as the launch."""
    return name if turn == 1 else f"{name}-{turn}"


def _turn(name: str, job_id: str) -> int:
    """Number a launch's job by its name; 0 if it has none that a launch gives."""
    if job_id == name:
        return 1
    match = re.fullmatch(rf"{re.escape(name)}-([2-9]|[1-9]\d+)", job_id)
    return int(match[1]) if match else 0


@contextmanager
def _answers(address: Address) -> Iterator[None]:
    """Tell a broken line, which is tried again, from an answer that says no."""
    try:
        yield
    except AuthenticationError as error:
        why = "refuses the token of this machine" if address.headers else "wants a token"
        raise ConfigError(
            f"the cluster at {address.url} {why}; put the cluster's own into ~/.ray/auth_token, "
            "or its file's name into RAY_AUTH_TOKEN_PATH, and unset RAY_AUTH_TOKEN"
        ) from error
    except _RefusedError as error:
        # 404 and the like are answers; 5xx is a head, or its agent, that is not ready.
        if error.status >= 500 and not error.is_taken:
            raise LineLostError(str(error)) from error
        raise
    except aiohttp.WSServerHandshakeError as error:
        kind = LaunchError if error.status == 404 else LineLostError
        raise kind(f"the cluster's jobs API answered {error.status}: {error.message}") from error
    except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL) as error:
        # No line is broken: nothing was sent. What was in the header is not shown.
        raise LaunchError(
            f"no request can be made to {address.url} ({type(error).__name__})"
        ) from error
    except (requests.RequestException, aiohttp.ClientError, OSError) as error:
        raise LineLostError(f"{type(error).__name__} at {address.url}") from error
    except RuntimeError as error:
        # Ray's client raises it bare when a line breaks in mid-follow, or a version differs.
        if "WebSocket" in str(error):
            raise LineLostError(str(error)) from error
        raise LaunchError(f"the cluster at {address.url} cannot be used: {error}") from error


@contextmanager
def _without_ray_address() -> Iterator[None]:
    """Keep Ray's client from preferring these variables to the address it is given."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
