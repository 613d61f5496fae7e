"""The paper's ablations by `droppos search`: does its choice win here, too?

Each trial has one setting of the published method changed. All are measured by k-NN among the same
held-out pictures, so a difference counts when it is larger than both intervals together allow.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import hypot
from pathlib import Path
from typing import Any

from droppos.measure.intervals import Proportion
from pipelines.evidence.cifar import Cifar
from pipelines.evidence.recipes import load_recipe
from pipelines.evidence.results import replace_file
from pipelines.recipe import Recipe
from pipelines.search import search
from pipelines.storage import open_place
from pipelines.trials import FILE

RECIPE = "cifar_ablations"
RESULTS = "ablations.csv"


@dataclass(frozen=True, slots=True, order=True)
class Trial:
    """One setting, and what came of it."""

    mask_ratio: float
    position_mask_ratio: float
    sigma: float
    sigma_decay: str
    knn: float
    """Share of held-out pictures labelled right by their 20 nearest others."""
    low: float
    high: float
    position_skill: float
    effective_rank: float
    seconds: float

    @property
    def setting(self) -> tuple[float, float, float, str]:
        """What was asked of it."""
        return self.mask_ratio, self.position_mask_ratio, self.sigma, self.sigma_decay


@dataclass(frozen=True, slots=True)
class Comparison:
    """The published setting beside another."""

    question: str
    other: str
    difference: float
    """k-NN of the published setting less the other's."""
    half: float
    """Half its 95 % interval, over pictures; of one seed each."""

    @property
    def verdict(self) -> str:
        """Whether the paper's choice is the better one here."""
        if abs(self.difference) <= self.half:
            return "not told apart"
        return "holds" if self.difference > 0 else "reversed"


def ablate(data: Cifar, folder: Path, out: Path, say: Callable[[str], None]) -> list[Trial]:
    """Run, or go on with, the search, and write its trials beside the other raw results.

    Args:
        data: Prepared data sets.
        folder: Where the search keeps its runs.
        out: Folder of the raw results.
        say: Told of each trial's end.

    Raises:
        DataError: If data or storage cannot be read.
        ConfigError: If the trials do not fit this machine.
    """
    recipe = load_recipe(RECIPE)
    recipe = replace(
        recipe,
        data=replace(recipe.data, path=data.train, holdout=data.test),
        run=replace(recipe.run, storage=str(folder)),
    )

    def on_event(event: Mapping[str, Any]) -> None:
        if event.get("kind") == "trial" and event.get("state") == "finished":
            say(f"{event['name']}: {event.get('objective')}")

    search(recipe, resume=True, on_event=on_event)
    trials = found(recipe)
    write(out / RESULTS, trials)
    return trials


def found(recipe: Recipe) -> list[Trial]:
    """Read the finished trials of a search from its table in storage."""
    table = open_place(recipe.home) / FILE
    if not table.exists():
        return []
    records = json.loads(table.read_bytes())["trials"]
    return sorted(_trial(recipe, record) for record in records if record["state"] == "finished")


def _trial(recipe: Recipe, record: Mapping[str, Any]) -> Trial:
    figures = record["figures"]
    asked = recipe.measure.pictures
    knn = Proportion(round(figures["knn"] * asked), asked)
    own = {
        name: record["point"].get(f"method.{name}", getattr(recipe.method, name))
        for name in ("mask_ratio", "position_mask_ratio", "sigma", "sigma_decay")
    }
    low, high = knn.interval
    return Trial(
        **own,
        knn=knn.value,
        low=low,
        high=high,
        position_skill=figures["position_skill"],
        effective_rank=figures["effective_rank"],
        seconds=record["seconds"],
    )


def write(file: Path, trials: Sequence[Trial]) -> None:
    """Write the trials, sorted."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Trial)], lineterminator="\n")
    writer.writeheader()
    for trial in sorted(trials):
        values = asdict(trial).items()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values})
    replace_file(file, text.getvalue())


def read(file: Path) -> list[Trial]:
    """Read what :func:`write` wrote; none if there is no file."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [
            Trial(**{f.name: f.type(line[f.name]) for f in fields(Trial)})  # pyright: ignore[reportCallIssue, reportArgumentType]
            for line in csv.DictReader(lines)
        ]


def compare(trials: Sequence[Trial], recipe: Recipe) -> Iterator[Comparison]:
    """Hold the published setting against each other one, a field at a time."""
    method = recipe.method
    published = (
        method.mask_ratio, method.position_mask_ratio, method.sigma, method.sigma_decay
    )  # fmt: skip
    best = next((trial for trial in trials if trial.setting == published), None)
    if best is None:
        return
    told: set[tuple[str, str]] = set()  # sigma 0 has nothing to decay, so it is there twice
    for trial in trials:
        question, other = _changed(best, trial)
        if trial is best or (question, other) in told:
            continue
        told.add((question, other))
        half = hypot(best.high - best.low, trial.high - trial.low) / 2
        yield Comparison(question, other, best.knn - trial.knn, half)


def _changed(best: Trial, trial: Trial) -> tuple[str, str]:
    if trial.mask_ratio != best.mask_ratio:
        return f"mask ratio {best.mask_ratio:g}", f"{trial.mask_ratio:g}"
    if trial.position_mask_ratio != best.position_mask_ratio:
        return f"drop ratio {best.position_mask_ratio:g}", f"{trial.position_mask_ratio:g}"
    decay = "" if trial.sigma == 0 else f", {_in_words(trial.sigma_decay)}"
    return f"sigma {best.sigma:g}, {_in_words(best.sigma_decay)}", f"{trial.sigma:g}{decay}"


def _in_words(decay: str) -> str:
    return "constant" if decay == "constant" else "decaying"
