"""The demo: the whole main job, small but real, on photographs that come with our dependencies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

from droppos.export.flow import ExportReport
from pipelines.demo_pictures import write_demo_pictures
from pipelines.evaluate import Evaluation, evaluate
from pipelines.export import export_checkpoint
from pipelines.heard import OnEvent
from pipelines.prepare import PrepareReport, prepare
from pipelines.pretrain import Outcome, pretrain
from pipelines.recipe import Recipe
from pipelines.tracking import local_folder


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What the demo did."""

    recipe: Recipe
    train: PrepareReport
    holdout: PrepareReport
    outcome: Outcome
    export: ExportReport | None
    """None when training was stopped before its end."""
    evaluation: Evaluation | None
    seconds: dict[str, float]
    """Wall time of each part."""


def demo(
    recipe: Recipe,
    *,
    resume: bool,
    say: Callable[[str], None],
    on_event: OnEvent | None = None,
) -> DemoReport:
    """Prepare photographs, pre-train on them, export the backbone and measure it.

    Args:
        recipe: The shipped demo recipe, with whatever was overridden.
        resume: Go on with the demo's last run.
        say: Told what begins.
        on_event: Hears of training's progress.
    """
    clock = _Clock()
    say("cutting photographs into tiles, and packing them into shards")
    with clock.time("prepare"):
        recipe, train, holdout = with_demo_pictures(recipe)
    say("pre-training: Ray Data streams, Ray Train steps, MLflow listens")
    with clock.time("pretrain"):
        outcome = pretrain(recipe, resume=resume, on_event=on_event)
    if not outcome.finished or outcome.checkpoint is None:
        return DemoReport(recipe, train, holdout, outcome, None, None, clock.seconds)
    say("exporting the backbone, and comparing it with the trained model")
    with clock.time("export"):
        backbone = f"{outcome.home}/backbone"
        export = export_checkpoint(outcome.checkpoint.uri, backbone)
    say("measuring it on photographs it has never seen")
    with clock.time("evaluate"):
        assert recipe.data.holdout is not None
        measured = evaluate(backbone, recipe.data.holdout, measure=recipe.measure)
    return DemoReport(recipe, train, holdout, outcome, export, measured, clock.seconds)


def with_demo_pictures(recipe: Recipe) -> tuple[Recipe, PrepareReport, PrepareReport]:
    """Prepare photographs that come with our dependencies, to train on and to measure on."""
    folder = local_folder(recipe)
    pictures = write_demo_pictures(folder / "pictures")
    data = folder / "data"
    train = prepare(str(pictures.train), str(data / "train"))
    holdout = prepare(str(pictures.holdout), str(data / "holdout"))
    named = replace(recipe.data, path=str(data / "train"), holdout=str(data / "holdout"))
    return replace(recipe, data=named), train, holdout


class _Clock:
    """Wall time of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = perf_counter() - started
