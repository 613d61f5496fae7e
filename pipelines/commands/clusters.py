"""Machines for a run: planned, brought up, followed, ended."""

import sys
from json import dumps
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.commands.flags import OnFlags, QuestionFlags, RecipeFlags, RecipeName
from pipelines.commands.speech import busy, console, refuse_late
from pipelines.launch.on import On
from pipelines.launch.request import JobKind, Request
from pipelines.plan.question import Question
from pipelines.recipe import Recipe


def plan(
    file: RecipeName = "",
    json: bool = False,
    question: QuestionFlags = Question(),  # noqa: B008 - frozen
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Say what a run would take before it is paid for: memory, pace, hours, load and price.

    Nothing is started or measured; each figure says whether it is a model or a measurement.

    Args:
        file: A YAML file, or the name of a recipe that is shipped.
        json: Print all of it as JSON, for scripts.
        question: Machine types, prices, rates and what is measured already.
        recipe: Fields given here override the file's.
    """
    refuse_late(file, "plan")
    from pipelines.plan.figures import as_json
    from pipelines.plan.job import plan as job
    from pipelines.plan.report import show_plan

    with busy("simulating"):
        found = job(recipe, question)
    if json:
        print(dumps(as_json(found), indent=1))
    else:
        show_plan(console, found)


def launch(
    file: RecipeName = "",
    name: str | None = None,
    on: OnFlags = On(),  # noqa: B008 - frozen
    job: JobKind = "pretrain",
    resume: bool = False,
    allow_changes: bool = False,
    keep: bool = False,
    detach: bool = False,
    yes: bool = False,
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Bring a cluster up, run a recipe on it, follow it, and end the machines.

    Once the job is handed over, Ctrl-C and a closed terminal only stop following it: `droppos
    attach`, `stop` and `down` go on from there. Exit code 0: finished; 1: failed; 130: no longer
    followed, or stopped.

    Args:
        file: A YAML file, or the name of a recipe that is shipped.
        name: Name of the launch, and of its cluster; run.name when not given.
        on: Where.
        job: What is done with the recipe.
        resume: Go on from the newest checkpoint of run.storage/run.name, if there is one.
        allow_changes: Resume even if data or recipe differ from the checkpoint's.
        keep: Leave the cluster when the job has ended; another launch of this name runs on it.
        detach: Don't follow; on aws the cluster ends by itself after its job, unless keep is said.
        yes: Don't ask.
        recipe: Fields given here override the file's.
    """
    refuse_late(file, "launch")
    from pipelines.launch import flow, places, terminal

    asked = Request(recipe=recipe, job=job, resume=resume, allow_changes=allow_changes)
    made, backend = places.planned(name or places.launch_name(recipe.run.name), on, keep=keep)
    with terminal.signals_interrupt():
        speaking = terminal.terminal(console, yes=yes)
        sys.exit(flow.launch(asked, backend, made, speaking, start=Path.cwd(), detach=detach))


def attach(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")],
    on: OnFlags = On(),  # noqa: B008 - frozen
) -> None:
    """Follow a launch's job again, and end the machines when it has ended.

    Args:
        name: Name of the launch.
        on: Where it is, if another machine began it.
    """
    from pipelines.launch import flow, places, terminal

    with terminal.signals_interrupt():
        sys.exit(flow.attach(*places.found(name, on), terminal.terminal(console, yes=False)))


def stop(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")],
    yes: bool = False,
    on: OnFlags = On(),  # noqa: B008 - frozen
) -> None:
    """Ask a launch's job for a last checkpoint, wait for it, and end the machines.

    Args:
        name: Name of the launch.
        yes: Don't ask, even if another machine submitted the job.
        on: Where it is, if another machine began it.
    """
    from pipelines.launch import flow, places, terminal

    with terminal.signals_interrupt():
        sys.exit(flow.stop(*places.found(name, on), terminal.terminal(console, yes=yes)))


def down(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")],
    yes: bool = False,
    on: OnFlags = On(),  # noqa: B008 - frozen
) -> None:
    """End all machines of a launch, and see that none is left.

    Args:
        name: Name of the launch.
        yes: Don't ask, even if a job still runs.
        on: Where it is, if another machine began it.
    """
    from pipelines.launch import flow, places, terminal

    with terminal.signals_interrupt():
        sys.exit(flow.down(*places.found(name, on), terminal.terminal(console, yes=yes)))


def watch_spot(
    head: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADDRESS")],
) -> None:
    """Watch this EC2 machine for the notice that it is taken back, and drain its Ray node then.

    cluster.yaml starts it on each machine that may be. It ends once the notice has been passed on.

    Args:
        head: Address of the cluster's head: host:port.
    """
    from pipelines.notices import check_head, only_one, watch

    check_head(head)
    with only_one("watch-spot"):
        watch(head)
