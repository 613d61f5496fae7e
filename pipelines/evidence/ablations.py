"""The paper's ablations by `droppos search`: does its choice win here, too?

Pairs of trials that differ in one setting are compared by k-NN among the same held-out pictures.
Each is trained once, for the same epochs: a difference larger than the pictures' own noise shows
where it leans, and not how another seed would fall.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import hypot
from pathlib import Path
from typing import Any

from droppos.measure.intervals import Proportion
from pipelines.evidence.cifar import Cifar
from pipelines.evidence.protocol import digest_of, measuring, training
from pipelines.evidence.recipes import load_recipe
from pipelines.evidence.tables import read_table, write_table
from pipelines.recipe import Recipe
from pipelines.search import search
from pipelines.space import apply, grid_points, parse_space
from pipelines.storage import open_place
from pipelines.trials import FILE

RECIPE = "cifar_ablations"
RESULTS = "ablations.csv"
SETTING = ("mask_ratio", "position_mask_ratio", "sigma", "sigma_decay")
"""Fields of `method` that are varied."""


Setting = tuple[float, float, float, str]


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
    protocol: str
    """Digest of the recipe that the settings vary."""

    @property
    def setting(self) -> Setting:
        """What was asked of it."""
        return self.mask_ratio, self.position_mask_ratio, self.sigma, self.sigma_decay


@dataclass(frozen=True, slots=True)
class Comparison:
    """A setting that the paper chose beside another, all else being equal."""

    question: str
    other: str
    difference: float
    """k-NN of the paper's choice less the other's."""
    half: float
    """Half its 95 % interval over the pictures, taken as if each trial had its own."""
    position: float
    """Position skill of the paper's choice less the other's."""

    @property
    def verdict(self) -> str:
        """Where it leans: to the paper's choice, or against it."""
        if abs(self.difference) <= self.half:
            return "not told apart"
        return "to the paper's" if self.difference > 0 else "to the other"


def ablate(data: Cifar, folder: Path, out: Path, say: Callable[[str], None]) -> None:
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
        run=replace(recipe.run, storage=str(folder), name=f"{recipe.run.name}-{_searched(recipe)}"),
    )

    def on_event(event: Mapping[str, Any]) -> None:
        if event["kind"] == "trial" and event["state"] in {"finished", "failed"}:
            came = event.get("error") or f"k-NN {event.get('objective', 0):.4g}"
            say(f"{event['trial']}: {event['state']}, {came}")

    try:
        search(recipe, resume=True, on_event=on_event)
    finally:
        # What another machine has found stays, whatever is known here.
        known = {trial.setting: trial for trial in (*read(out / RESULTS), *found(recipe))}
        write(out / RESULTS, list(known.values()))


def protocol() -> str:
    """Hash what all trials share: those of another digest are not compared with these."""
    recipe = load_recipe(RECIPE)
    return digest_of(training(recipe), measuring(recipe))


def _searched(recipe: Recipe) -> str:
    """Hash all that a search is refused for when it has changed: then it is another search."""
    search = recipe.search
    return digest_of(
        training(recipe), asdict(recipe.measure), search.space, search.algorithm, search.objective
    )


def missing(out: Path) -> int:
    """Count the settings that the raw results do not have."""
    recipe = load_recipe(RECIPE)
    asked = {
        tuple(getattr(apply(recipe, point).method, name) for name in SETTING)
        for point in grid_points(parse_space(recipe), recipe)
    }
    return len(asked - {trial.setting for trial in read(out / RESULTS)})


def found(recipe: Recipe) -> list[Trial]:
    """Read the finished trials of a search from its table in storage."""
    table = open_place(recipe.home) / FILE
    if not table.exists():
        return []
    records = json.loads(table.read_bytes())["trials"]
    own = protocol()
    finished = (record for record in records if record["state"] == "finished")
    return sorted(_trial(recipe, record, own) for record in finished)


def _trial(recipe: Recipe, record: Mapping[str, Any], own_protocol: str) -> Trial:
    figures = record["figures"]
    asked = recipe.measure.pictures
    knn = Proportion(round(figures["knn"] * asked), asked)
    own = {
        name: record["point"].get(f"method.{name}", getattr(recipe.method, name))
        for name in SETTING
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
        protocol=own_protocol,
    )


def write(file: Path, trials: Sequence[Trial]) -> None:
    """Write the trials, sorted."""
    write_table(file, Trial, trials)


def read(file: Path) -> list[Trial]:
    """Read the trials of this recipe among what :func:`write` wrote; none if there is no file.

    Raises:
        DataError: If it is something else.
    """
    trials, own = read_table(file, Trial, "is no table of trials"), protocol()
    return [trial for trial in trials if trial.protocol == own]


def compare(trials: Sequence[Trial]) -> Iterator[Comparison]:
    """Hold the paper's choice against each other one, a field at a time.

    The paper hides and drops three quarters, smooths with a sigma of 1, and lets it decay.
    """
    known = {trial.setting: trial for trial in trials}

    def pair(question: str, other: str, chosen: Setting, beside: Setting) -> Iterator[Comparison]:
        if chosen in known and beside in known:
            a, b = known[chosen], known[beside]
            half = hypot(a.high - a.low, b.high - b.low) / 2
            skill = a.position_skill - b.position_skill
            yield Comparison(question, other, a.knn - b.knn, half, skill)

    published: Setting = (0.75, 0.75, 1.0, "step")
    for ratio in (0.0, 0.25, 0.5):
        yield from pair("mask ratio 0.75", f"{ratio:g}", published, (ratio, 0.75, 1.0, "step"))
    for ratio in (0.25, 0.5, 1.0):
        yield from pair("drop ratio 0.75", f"{ratio:g}", published, (0.75, ratio, 1.0, "step"))
    for sigma in (0.0, 2.0):
        other = f"{sigma:g}" + ", decaying" * (sigma > 0)
        yield from pair("sigma 1, decaying", other, published, (0.75, 0.75, sigma, "step"))
    for sigma in (1.0, 2.0):
        yield from pair(
            f"sigma {sigma:g}, decaying",
            f"{sigma:g}, constant",
            (0.75, 0.75, sigma, "step"),
            (0.75, 0.75, sigma, "constant"),
        )
