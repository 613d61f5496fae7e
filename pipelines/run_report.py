"""The report of a run: one HTML file for who was not there.

How far it came and what its backbone is worth, its course, its pictures, what data and machines it
took, its recipe, and its receipt. All of it is read from the run's folder; what only MLflow knows,
evaluations and machines, is added where that can be reached.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from droppos.draw.course import draw_course
from droppos.errors import DataError, DropposError
from pipelines import history, receipt
from pipelines.backbone import from_checkpoint
from pipelines.checkpoints import Saved, require_recipe
from pipelines.gallery import draw_gallery, draw_sight
from pipelines.holdout import load_pictures
from pipelines.ledger import pointer
from pipelines.page import Cell, bullets, image, missing, page, paragraph, picture, section, table
from pipelines.recipe import Recipe
from pipelines.recipe_file import from_dict, to_yaml
from pipelines.runs import RunFacts, facts_of
from pipelines.secrets import redact
from pipelines.storage import Place
from pipelines.sync import real_uri
from pipelines.tracking import client_of, reachable

_log = logging.getLogger(__name__)

LOOKED_AT = 256
"""Held-out pictures that are drawn from, on this machine."""

COURSE = {
    "train/loss": "Training loss",
    "train/position_excess_nats": "Nats above the least loss",
    "train/position_accuracy": "Training accuracy, share",
    "train/carrying_patches": "Patches of a picture that carry the loss",
    "holdout/position/skill": "Position skill, held out",
    "holdout/features/knn_skill": "k-NN skill, held out",
    "holdout/features/effective_rank": "Effective rank, held out",
    "train/lr": "Learning rate",
    "train/sigma_patches": "Sigma, patches",
    "train/grad_norm": "Norm of the gradient",
    "data/images_per_s": "Images/s",
    "data/wait_fraction": "Share of time waiting for pictures",
    "compute/mfu": "Model FLOPs utilisation, share",
}
"""Metrics of the course, in their order, with their titles."""

PICTURES = {
    "reassembly": "Loose pieces of held-out photographs, and where the model puts them.",
    "confusion": "Where wrong answers fall, relative to the right cell.",
    "curves": "Loss and accuracy of positions.",
    "attention": "What the class token looks at, in the last block.",
    "features": "Patch features: their first three principal components as colours.",
}

FIGURES = {
    "holdout/position/accuracy": ("Pieces put into the right cell", "holdout/position/chance"),
    "holdout/position/accuracy_within_one_cell": ("Pieces put within one cell", ""),
    "holdout/features/knn_accuracy": ("k-NN among the held-out", "holdout/features/knn_chance"),
    "holdout/features/probe_accuracy": ("Linear probe", ""),
}


Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Steps and values of each metric, until the checkpoint."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What there is of a run."""

    home: Place
    saved: Saved
    recipe: Recipe
    tracked: RunFacts | None
    """Its MLflow run; None if that cannot be reached."""
    curves: Curves

    @property
    def measured_at(self) -> int | None:
        """Last step until the checkpoint that was measured on held-out pictures, if one was."""
        if self.saved.record.get("metrics"):
            return self.saved.step
        steps = [points[-1][0] for name, points in self.curves.items() if _is_held_out(name)]
        return max(steps, default=None)

    @property
    def figures(self) -> Mapping[str, float]:
        """What was measured at that step."""
        past = {
            name: points[-1][1]
            for name, points in self.curves.items()
            if _is_held_out(name) and points[-1][0] == self.measured_at
        }
        return {**past, **self.saved.record.get("metrics", {})}


def _is_held_out(name: str) -> bool:
    return name.startswith("holdout/")


def run_report(saved: Saved) -> str:
    """Write the report of a run as it was at a checkpoint.

    Args:
        saved: The checkpoint.

    Returns:
        A page that needs nothing else.

    Raises:
        DataError: If it names no recipe.
    """
    require_recipe(saved)
    home = saved.home
    curves = _curves(saved)
    found = _Run(home, saved, from_dict(saved.record["recipe"]), _tracked(home), curves)
    return page(
        f"Run {found.recipe.run.name}",
        [
            "<header>",
            f"<h1>Run {escape(found.recipe.run.name)}</h1>",
            paragraph(_protocol(found), "soft"),
            '<div class="verdict">',
            *(
                paragraph(sentence)
                for sentence in verdict(found.figures, saved.step, found.measured_at)
            ),
            "</div></header><main>",
            _evaluations(found),
            _course(curves),
            *_pictures(found),
            _facts("Data", _data(saved)),
            _machines(found),
            section("Recipe", f"<pre>{escape(redact(to_yaml(found.recipe)))}</pre>"),
            _receipt(saved),
            "</main>",
        ],
    )


def _curves(saved: Saved) -> Curves:
    try:
        return history.curves(saved.home, saved.step)
    except DataError as error:
        _log.warning("the report is without the run's history: %s", error)
        return {}


def _tracked(home: Place) -> RunFacts | None:
    known = pointer(home)
    if not known:
        return None
    try:
        uri = real_uri(known["uri"])
        with reachable(uri):
            return facts_of(client_of(uri).get_run(known["run_id"]))
    except DropposError as error:
        _log.warning("the report is without what only MLflow knows: %s", error)
        return None


def _protocol(run: _Run) -> str:
    model, data = run.recipe.model, run.saved.record.get("data") or {}
    pictures = f", {data['pictures']:,} pictures" if "pictures" in data else ""
    size = "x".join(map(str, model.image_size))
    when = run.saved.record["saved_at"].replace("T", " at ")
    return (
        f"ViT-{model.size} of {size} pixels, {run.recipe.optim.epochs} epochs{pictures}. The "
        f"checkpoint of step {run.saved.step:,}, saved {when}."
    )


def verdict(figures: Mapping[str, float], step: int, measured_at: int | None) -> list[str]:
    """Say in sentences what a run's figures on held-out pictures mean.

    Args:
        figures: By name.
        step: Of the checkpoint.
        measured_at: Step they are of; None if there are none.
    """
    said = []
    accuracy = figures.get("holdout/position/accuracy")
    if accuracy is not None:
        chance = figures["holdout/position/chance"]
        low, high = (figures.get(f"holdout/position/accuracy_{end}_95") for end in ("low", "high"))
        interval = "" if low is None or high is None else f" ({low:.1%} to {high:.1%})"
        learnt = (low or accuracy) > chance
        said.append(
            f"The model {'has learnt to place pieces' if learnt else 'is still guessing'}: it puts "
            f"{accuracy:.1%}{interval} of the pieces of pictures it has never seen into the right "
            f"cell; a guess that looks at no picture {chance:.1%}."
        )
    if (skill := figures.get("holdout/features/knn_skill")) is not None:
        said.append(
            "By its features, the nearest others of a picture name its class in "
            f"{figures['holdout/features/knn_accuracy']:.1%} of the cases, a skill of {skill:.2f} "
            "(0 is chance, 1 is always right)."
        )
    if (rank := figures.get("holdout/features/effective_rank")) is not None:
        said.append(f"The features use {rank:.1f} directions (effective rank).")
    if measured_at is None:
        return [f"Until step {step:,} nothing was measured on held-out pictures (data.holdout)."]
    if measured_at < step:
        said.append(f"These figures are of step {measured_at:,}, the last one that was measured.")
    return said


def _evaluations(run: _Run) -> str:
    rows = []
    for name, (label, chance) in FIGURES.items():
        if name in run.figures:
            guess = run.figures.get(chance)
            rows.append(_row(label, run.figures, name, "-" if guess is None else f"{guess:.1%}"))
    tracked = {} if run.tracked is None else run.tracked.metrics
    for name in sorted(tracked):
        if name.startswith("evaluation/") and name.endswith("accuracy"):
            rows.append(_row(name.removeprefix("evaluation/"), tracked, name, "-"))
    if not rows:
        return section("Evaluation", missing("Nothing was measured on labelled or held-out data."))
    head = [Cell("", wide=True), Cell("value"), Cell("95 % interval"), Cell("chance")]
    caption = (
        "Figures without a data set's name are of the run's own held-out pictures. `droppos "
        "evaluate --track` adds others; these are the newest in MLflow, whichever step they are of."
    )
    return section("Evaluation", table(head, rows, caption))


def _row(
    label: str, figures: Mapping[str, float], name: str, chance: str
) -> tuple[str, list[Cell]]:
    low, high = figures.get(f"{name}_low_95"), figures.get(f"{name}_high_95")
    interval = "-" if low is None or high is None else f"{low:.1%} to {high:.1%}"
    return "", [Cell(label, wide=True), Cell(f"{figures[name]:.1%}"), Cell(interval), Cell(chance)]


def _course(curves: Curves) -> str:
    panels = {title: curves[name] for name, title in COURSE.items() if curves.get(name)}
    if not panels:
        return section("Course", missing("The run's folder has no history of its metrics."))
    alt = f"Curves over the steps of {', '.join(panels)}"
    caption = "Over the optimizer steps. A dense curve is its running mean over its own pale trace."
    return section("Course", picture(draw_course(panels), alt, caption))


def _pictures(run: _Run) -> list[str]:
    recipe = run.recipe
    if recipe.data.holdout is None:
        return [section("Pictures", missing("The run held no pictures out (data.holdout)."))]
    measure = replace(recipe.measure, pictures=min(recipe.measure.pictures, LOOKED_AT))
    try:
        backbone = from_checkpoint(run.saved)
        shown = load_pictures(recipe.data.holdout, recipe.model.image_size, measure.pictures)
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if backbone.droppos is None:
                files, _ = draw_sight(backbone.encoder, recipe.model.grid, shown, folder)
            else:
                past = lambda name: run.curves.get(name, ())  # noqa: E731
                _, files = draw_gallery(backbone.droppos, measure, shown, past, folder)
            return [
                section(
                    file.stem.capitalize(),
                    image(file.read_bytes(), PICTURES[file.stem], PICTURES[file.stem]),
                )
                for file in files
                if file.stem != "curves"  # the course has them
            ]
    except (DropposError, OSError, RuntimeError) as error:
        return [section("Pictures", missing(f"They could not be drawn: {error}"))]


def _machines(run: _Run) -> str:
    if run.tracked is None:
        return section("Machines and cost", missing("MLflow could not be reached."))
    wanted = ("hardware.", "version.", "command", "mlflow.source.git.commit", "code.")
    told: dict[str, Any] = {
        name: value for name, value in sorted(run.tracked.tags.items()) if name.startswith(wanted)
    }
    for name, value in sorted(run.tracked.metrics.items()):
        if name.startswith(("cost/", "system/")):
            told[name] = f"{value:,.4g}"
    return _facts("Machines and cost", told)


def _data(saved: Saved) -> dict[str, Any]:
    recipe = saved.record["recipe"]["data"]
    facts = dict(saved.record.get("data") or {})
    facts.pop("content", None)  # a hash, which the receipt has
    return {"set": redact(str(recipe["path"])), "held out": redact(str(recipe["holdout"])), **facts}


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    if not facts:
        return section(title, missing("Nothing is known."))
    rows = [
        ("", [Cell(name, wide=True), Cell(_words(value), wide=True)])
        for name, value in facts.items()
    ]
    return section(title, table([Cell("", wide=True), Cell("", wide=True)], rows))


def _words(value: Any) -> str:
    if isinstance(value, list):
        some = ", ".join(map(str, value[:8]))
        return f"{len(value):,}: {some}{', …' if len(value) > 8 else ''}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _receipt(saved: Saved) -> str:
    try:
        made, notes = receipt.make(saved)
    except DropposError as error:
        return section("Receipt", missing(f"It could not be made: {error}"))
    text = escape(json.dumps(made, indent=1))
    return section(
        "Receipt",
        paragraph("`droppos receipt --verify` holds it against the run's folder.", "soft"),
        *([bullets(notes)] if notes else []),
        f"<details><summary>sha256 {made['sha256']}</summary><pre>{text}</pre></details>",
    )
