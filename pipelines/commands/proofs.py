"""Without an account or pictures of yours: demos, and a drill."""

import sys
from pathlib import Path

from pipelines.commands.flags import RecipeFlags, RecipeName, StudyFlags
from pipelines.commands.speech import (
    announce,
    conclude_search,
    console,
    refuse_late,
    say,
    say_news,
    searching,
)
from pipelines.evidence.study import Study
from pipelines.recipe import Recipe


def demo(resume: bool = False, recipe: RecipeFlags = Recipe()) -> None:  # noqa: B008 - frozen
    """Run the whole job on embedded photographs: prepare, pretrain, export, evaluate.

    Args:
        resume: Go on with the last demo instead of refusing to overwrite it.
        recipe: Fields given here override the demo recipe's.
    """
    announce()
    from pipelines.demo import demo as job
    from pipelines.report import show_demo
    from pipelines.screen import Screen

    with Screen(recipe, console) as screen:
        report = job(recipe, resume=resume, say=screen.say, on_event=screen.event)
    show_demo(console, report)
    if not report.outcome.finished:
        sys.exit(130)


def demo_search(resume: bool = False, recipe: RecipeFlags = Recipe()) -> None:  # noqa: B008
    """Search on embedded photographs: eight trials, four at a time on one stream, and a report.

    The last line is for scripts.

    Args:
        resume: Go on with the last one instead of refusing to overwrite it.
        recipe: Fields given here override the demo search's recipe.
    """
    announce()
    from pipelines.demo_search import demo_search as job
    from pipelines.demo_search import line

    with searching() as screen:
        recipe, outcome = job(recipe, resume=resume, say=say, on_event=screen.event)
    conclude_search(recipe, outcome, line(outcome))


def drill(
    file: RecipeName = "",
    outage_s: float = 30,
    only: tuple[str, ...] = (),
    recipe: RecipeFlags = Recipe(),  # noqa: B008 - frozen
) -> None:
    """Kill workers, nodes, storage and MLflow under a run, and show that nothing is lost.

    Without RAY_ADDRESS it plays on nodes and servers of its own on this machine. On the cluster of
    RAY_ADDRESS it kills workers and a node there, and takes neither storage nor MLflow away; name
    --run.storage s3://BUCKET/FOLDER then. The last line is for scripts.

    Args:
        file: A YAML file, or the name of a recipe that is shipped; `drill` when not given.
        outage_s: Seconds that storage and MLflow are away.
        only: Some of kill, term, hang, damage, storage, mlflow, notice, node, grow; all of them
            when not given.
        recipe: Fields given here override the file's.
    """
    refuse_late(file, "drill")
    announce()
    from pipelines.drill import drill as job
    from pipelines.report import show_drill

    report = job(recipe, outage_s=outage_s, only=only, say=say, on_event=say_news)
    show_drill(console, report)
    print(report.line)
    if not report.passed:
        sys.exit(1)


def evidence(
    folder: Path = Path("droppos-runs/evidence"),
    out: Path = Path("docs/evidence"),
    study: StudyFlags = Study(),  # noqa: B008 - frozen
) -> None:
    """Train DropPos and its controls on CIFAR-10, and show what each has learnt.

    It takes hours, can be interrupted at any time, and goes on where it was. The last line is for
    scripts.

    Args:
        folder: Where pictures, checkpoints and logs are kept.
        out: Where the raw results are; figures that are there are not taken again.
        study: How much is compared.
    """
    announce()
    from pipelines.evidence.flow import evidence as job
    from pipelines.launch.terminal import signals_interrupt

    with signals_interrupt():
        done = job(study, folder, out, say)
    for picture in done.pictures:
        say(f"picture: {picture}")
    if done.missing:
        say(f"{done.missing} cells or trials are not known yet: droppos evidence goes on with them")
    print(done.line)
    if done.missing:
        sys.exit(130)
