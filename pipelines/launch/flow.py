"""Launch, attach, stop, down: what a person asks for, in order.

    launch   look → cost → ask → record → up → hand over → follow → down, or leave it
    attach             find the job → follow → down, or leave it
    stop               ask the job to save and end → follow → down, or leave it
    down               ask if a job still runs → down

On a cluster that stands, down ends no machines: it lets the launch go once nothing of it runs.

Each ends with an exit code: 0 finished (stop and down: done as asked), 1 failed, 130 no longer
followed, or stopped.
"""

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from droppos.errors import ConfigError, DropposError
from pipelines.launch import folder, jobs, record, request
from pipelines.launch.backend import Address, Backend
from pipelines.launch.check import Check, Look, Wrong, look, passed
from pipelines.launch.errors import LaunchError, LineLostError, TakenError
from pipelines.launch.jobs import LAUNCH, MARK, End, Job, Submission
from pipelines.launch.recall import recalled
from pipelines.launch.record import Record
from pipelines.launch.request import Request
from pipelines.launch.terminal import Terminal, signals_ignored

HEAD_S = 300.0
"""Seconds that the jobs API of a cluster that has just come up has to answer."""
KEEP = "keep"
"""Metadata of a job: whether its cluster stays when it has ended."""


def launch(
    asked: Request,
    backend: Backend,
    planned: Record,
    terminal: Terminal,
    *,
    start: Path,
    detach: bool = False,
) -> int:
    """Bring a cluster up and run a job on it.

    Args:
        asked: The job.
        backend: Where.
        planned: The launch's record, not yet written.
        terminal: Who asks.
        start: Folder one is in.
        detach: Come back as soon as the job is handed over.

    Returns:
        Exit code.

    Raises:
        ConfigError: If something is wrong that a person can mend; nothing was started.
        LaunchError: If machines failed; what was started has been ended, or is named.
    """
    asked.check()
    record.check_free(planned)
    with tempfile.TemporaryDirectory() as made:
        asked = _looked(asked, backend, terminal, start, Path(made))
        cost = backend.cost()
        terminal.cost(cost)
        if not terminal.ask(f"launch {planned.name} on {backend.where}?"):
            terminal.say("nothing was started")
            return End.FAILED.code
        begun = record.begin(replace(planned, costs=cost.line, **backend.place()))
        # Temporary files may be on another disk.
        package = Path(shutil.move(Path(made) / "package.zip", begun.file("package.zip")))
    with _taken_back(begun, backend, terminal):
        backend.up(terminal.say)
        begun = begun.at("up")
        with backend.address() as address:
            job_id = jobs.ready(address, HEAD_S, terminal.say).next_id(begun.name)
            # Before it is sent: a crash must not lose it.
            begun = begun.at("up", job=job_id, mark=secrets.token_hex(8))
            with recalled(begun, backend, address, terminal):
                jobs.hand_over(address, job_id, _submission(asked, backend, begun, package))
                begun = begun.at("submitted")
    terminal.say(f"job {job_id} is handed over; from here on Ctrl-C only stops following it")
    if detach:
        terminal.say(_left(begun, backend))
        return End.FINISHED.code
    return _code(_follow(begun, backend, terminal, there=True))


def attach(found: Record, backend: Backend, terminal: Terminal) -> int:
    """Follow a launch's job again."""
    _check_place(found, backend)
    return _code(_follow(found, backend, terminal))


def stop(found: Record, backend: Backend, terminal: Terminal) -> int:
    """Ask a launch's job for a last checkpoint, and wait for it.

    A person is asked first if it is not the job that this machine submitted.

    Returns:
        0 if it stopped, or had ended; 1 if it failed; 130 if it was not waited for.
    """

    def ask(address: Address, job: Job) -> None:
        if job.running:
            question = f"job {job.id} was not submitted by this machine; save and end it anyway?"
            if job.metadata.get(MARK) != found.mark and not terminal.ask(question):
                raise LaunchError(f"job {job.id} was not stopped, and goes on")
            jobs.ready(address, jobs.LOOK_S).stop(job.id)
            terminal.say(f"job {job.id} was asked to save and end; it has {jobs.STOP_S} s")

    _check_place(found, backend)
    end = _follow(found, backend, terminal, first=ask)
    return 0 if end is End.STOPPED else _code(end)


def down(found: Record, backend: Backend, terminal: Terminal) -> int:
    """End all machines of a launch; on a cluster that stands, let the launch go.

    Returns:
        0 if none is left, or no job where the machines are another's; 1 otherwise.
    """
    _check_place(found, backend)
    if not backend.mortal:
        return 0 if _let_go(found, backend, terminal) else 1
    if doubt := _doubt(found, backend, terminal):
        question = f"{doubt}; end the machines anyway? (`droppos stop {found.name}` saves first)"
        if not terminal.ask(question):
            terminal.say("nothing was ended")
            return End.FAILED.code
    return 0 if _end(found, backend, terminal) else 1


def _looked(
    asked: Request, backend: Backend, terminal: Terminal, start: Path, made: Path
) -> Request:
    """Do all looks, and show them; give the request as it will be handed over."""
    try:
        recipe, changes = backend.adapted(asked.recipe)
    except Exception:  # whatever it is, a look at the same thing tells, beside all others
        recipe, changes = asked.recipe, []
    asked = replace(asked, recipe=recipe)
    remote = backend.remote

    def pack() -> str:
        top = folder.top_of(start)
        package = folder.pack(top, made / "package.zip", asked.files)
        return f"{top}: {package}"

    looks = [
        Look("secrets", partial(request.check_secrets, recipe)),
        Look("places", partial(request.check_places, recipe, remote=remote, job=asked.job)),
        Look("working directory", _wrongly(pack, "put what is not needed into .gitignore")),
        *backend.looks(recipe, asked.at_once),
        Look("run", partial(request.check_run, asked, remote=remote), after=("places",)),
        *_of_search(asked, remote),
        Look("MLflow", lambda: request.check_tracking(recipe, backend.job_env(), remote=remote)),
    ]
    checks = look(looks)
    checks += [Check("recipe", "note", change) for change in changes]
    terminal.checks(checks)
    if not passed(checks):
        wrong = [check.what for check in checks if check.state == "wrong"]
        raise ConfigError(f"not launched, and nothing was spent: {', '.join(wrong)}; see above")
    return asked


def _of_search(asked: Request, remote: bool) -> Sequence[Look]:
    if asked.job != "search":
        return []
    work = partial(request.check_search, asked.recipe, resume=asked.resume, remote=remote)
    return [Look("search", work, after=("places",))]


def _wrongly(work: Callable[[], str], way_out: str) -> Callable[[], str]:
    def wrapped() -> str:
        try:
            return work()
        except OSError as error:
            raise Wrong(str(error), "files that can be read", way_out) from error

    return wrapped


def _submission(asked: Request, backend: Backend, begun: Record, package: Path) -> Submission:
    env = backend.job_env()
    return Submission(
        entrypoint=asked.entrypoint,
        working_dir=package,
        env={**env, **request.tracking(asked.recipe, env)},
        metadata={
            LAUNCH: begun.name,
            MARK: str(begun.mark),
            KEEP: "yes" if begun.keep else "no",
            "run": asked.recipe.home,
        },
    )


@contextmanager
def _taken_back(begun: Record, backend: Backend, terminal: Terminal) -> Iterator[None]:
    """End what was started if the job is not handed over; but not under somebody else's job."""
    try:
        yield
    except TakenError:
        record.note(begun, "up" if backend.mortal else "ended")
        raise
    except BaseException as error:  # whatever it is: machines that nobody knows of cost money
        if not isinstance(error, KeyboardInterrupt):
            terminal.say(f"not handed over: {error}")
        if not backend.mortal:
            kept = record.find(begun.name)
            if kept is not None and kept.mark is None:  # else `recalled` knows what was sent
                record.note(begun, "ended")
        elif begun.keep:
            terminal.say(
                f"its machines stay, as --keep says: `droppos down {begun.name}` ends them"
            )
        else:
            _end(begun, backend, terminal)
        raise


def _follow(
    found: Record,
    backend: Backend,
    terminal: Terminal,
    first: Callable[[Address, Job], None] = lambda address, job: None,
    *,
    there: bool = False,
) -> End | None:
    """Show the job's output until it has ended, then end the cluster or leave it.

    Args:
        found: The launch.
        backend: Where.
        terminal: Who follows.
        first: Done before the job is followed.
        there: Whether it is known that the job is there.

    Returns:
        How it ended; None if it was no longer followed.
    """
    try:
        with backend.address() as address:
            job = _job(found, backend, address, terminal)
            there = True
            found = replace(found, keep=job.metadata.get(KEEP) == "yes")
            first(address, job)
            with _kept(found, terminal.show) as show:
                job = jobs.follow(address, job.id, show, terminal.say)
    except (KeyboardInterrupt, BrokenPipeError):  # or whoever read the output has left
        terminal.say(_left(found, backend) if there else _not_found(found, backend))
        return None
    except LineLostError as error:
        left = _left(found, backend) if there else _not_found(found, backend)
        raise LaunchError(f"{error}; {left}") from error
    return _conclude(found, backend, terminal, job)


def _job(found: Record, backend: Backend, address: Address, terminal: Terminal) -> Job:
    """Find the launch's job.

    Raises:
        LaunchError: If there is none.
    """
    asked = jobs.ready(address, HEAD_S if backend.mortal else jobs.LOOK_S, terminal.say)
    # Where others submit jobs too, one of their launches may have our name.
    own = None if backend.mortal else asked.marked(found.mark)
    job = own or asked.newest(found.name)
    if job is None:
        ends = "ends its machines" if backend.mortal else "lets it go"
        raise LaunchError(
            f"{found.name} has no job on {backend.where}: its launch ended before it was "
            f"handed over; `droppos down {found.name}` {ends}, then launch again"
        )
    return job


def _code(end: End | None) -> int:
    """Say to the shell how a job ended, or that it was left alone."""
    return jobs.INTERRUPTED if end is None else end.code


def _conclude(found: Record, backend: Backend, terminal: Terminal, job: Job) -> End:
    said = {End.FINISHED: "finished", End.STOPPED: "stopped", End.FAILED: "failed"}[job.end]
    # Ray's message repeats the end of the output, which has been shown.
    why = job.message.partition(", last available logs")[0]
    terminal.say(f"job {job.id} {said}" + (f": {why}" if job.end is End.FAILED else ""))
    if not backend.mortal:
        record.note(found, "ended")
    elif found.keep:
        record.note(found, "up")
        terminal.say(
            f"its cluster stays, as --keep said, and costs {found.costs or 'money'}; "
            f"`droppos down {found.name}` ends it"
        )
    elif not _end(found, backend, terminal):
        return End.FAILED
    return job.end


def _end(found: Record, backend: Backend, terminal: Terminal) -> bool:
    """End all machines, and say what is left; no signal but Ctrl-C stops it."""
    record.note(found, "ending")
    try:
        with signals_ignored():
            left = backend.down(terminal.say)
    except BaseException:  # whatever it is: a network that fails leaves machines, too
        terminal.say(f"machines may still be there: `droppos down {found.name}` again")
        raise
    if left:
        terminal.say(
            f"STILL THERE, and charged for: {', '.join(left)}; `droppos down {found.name}` again, "
            "or end them in the console"
        )
        return False
    record.note(found, "ended")
    terminal.say(f"nothing is left of {found.name} on {backend.where}")
    return True


def _let_go(found: Record, backend: Backend, terminal: Terminal) -> bool:
    """Note a launch on a cluster that stands as ended, unless a job of it still runs."""
    try:
        running = _running(found, backend, terminal)
    except DropposError as error:
        question = f"{_whether(found)} ({error}); let {found.name} go anyway?"
        if not terminal.ask(question):
            terminal.say("nothing was changed")
            return False
        running = ""
    if running:
        terminal.say(
            f"job {running} still runs on {backend.where}, which stays; `droppos stop "
            f"{found.name}` saves and ends the job"
        )
        return False
    record.note(found, "ended")
    terminal.say(f"{found.name} is let go; {backend.where} stays")
    return True


def _check_place(found: Record, backend: Backend) -> None:
    """See that this machine's settings lead to where the launch is: nothing is left elsewhere."""
    found.check_place(backend.place(), "set AWS_PROFILE, or the credentials, to those of its own")


def _doubt(found: Record, backend: Backend, terminal: Terminal) -> str:
    """Say why ending the machines could lose something; nothing if it could not."""
    if found.phase == "ended":
        return ""
    try:
        running = _running(found, backend, terminal)
    except DropposError as error:
        if found.is_on_disk() and found.job is None:
            return ""  # it has never come to a submission
        return f"{_whether(found)} ({error})"
    return f"job {running} still runs" if running else ""


def _whether(found: Record) -> str:
    named = f"the job {found.job}" if found.job else f"a job of {found.name}"
    return f"whether {named} still runs cannot be asked"


def _running(found: Record, backend: Backend, terminal: Terminal) -> str:
    """Name the jobs of a launch that may still do something."""
    with backend.address() as address:
        there = jobs.ready(address, jobs.LOOK_S, terminal.say).of(found.name)
    if (
        not backend.mortal and found.mark is not None
    ):  # others' of our name are not ours to wait for
        there = [job for job in there if job.metadata.get(MARK) == found.mark]
    return ", ".join(job.id for job in there if job.running)


def _left(found: Record, backend: Backend) -> str:
    costs = f" and costs {found.costs or 'money'}" if backend.mortal else ""
    ends = f", `droppos down {found.name}` ends the machines" if backend.mortal else ""
    return (
        f"no longer followed: the job goes on{costs}. `droppos attach {found.name}` follows it "
        f"again, `droppos stop {found.name}` saves and ends it{ends}"
    )


def _not_found(found: Record, backend: Backend) -> str:
    ends = f", `droppos down {found.name}` ends its machines, if any" if backend.mortal else ""
    return (
        f"no job of {found.name} was found on {backend.where}, so none was followed or stopped. "
        f"`droppos attach {found.name}` looks again{ends}"
    )


@contextmanager
def _kept(found: Record, show: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Keep the job's output on this machine, for its head's copy goes with the head."""
    if not found.is_on_disk():
        yield show
        return
    with found.file("job.log").open("w") as log:

        def both(text: str) -> None:
            log.write(text)
            log.flush()
            show(text)

        yield both
