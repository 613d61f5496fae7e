"""What the raw results come to: the tables of docs/evidence.md, and the line for scripts.

The page's words are written by people; the tables between its markers are written here, so that
no number on it is typed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from droppos.errors import DataError
from pipelines.evidence.ablations import RECIPE, Trial, compare
from pipelines.evidence.arms import ARMS, BY_NAME, FIGURES, Arm, figures_of
from pipelines.evidence.recipes import load_recipe
from pipelines.evidence.results import Estimate, Key, Row, estimate
from pipelines.evidence.study import Study
from pipelines.recipe import Recipe

SHARES = ("knn", "linear", "tenth", "all", "position", "location")
"""Figures that are shares, shown in percent."""
UNKNOWN = "?"


class Known:
    """The rows of a CSV, asked by what they are of."""

    def __init__(self, rows: Mapping[Key, Row]) -> None:
        self._rows = rows

    def over_seeds(self, arm: str, budget: int, figure: str) -> Estimate | None:
        """Average a figure over the seeds that are known."""
        own = (row for row in self._rows.values() if row.key[:2] == (arm, budget))
        return estimate(row.value for row in own if row.figure == figure)

    def any_of(self, arm: str, budget: int) -> Row | None:
        """Give some row of an arm that was trained."""
        found = (row for row in self._rows.values() if row.key[:2] == (arm, budget) and row.epochs)
        return next(found, None)

    def seeds(self, arm: str, budget: int) -> list[int]:
        """List the seeds of which anything is known."""
        return sorted({row.seed for row in self._rows.values() if row.key[:2] == (arm, budget)})

    def gain(self, budget: int, figure: str) -> Estimate | None:
        """Average what pre-training by DropPos adds to training from scratch, seed by seed."""
        pairs = [
            (self._rows.get(("paper", budget, seed, figure)),
             self._rows.get(("random", 0, seed, figure)))
            for seed in self.seeds("random", 0)
        ]  # fmt: skip
        return estimate(own.value - scratch.value for own, scratch in pairs if own and scratch)


def line(study: Study, rows: Mapping[Key, Row]) -> str:
    """Tell scripts what became of DropPos as published, at the largest budget that is known."""
    known = Known(rows)
    asked = sorted({study.budget, *study.curve}, reverse=True)
    budget = next((b for b in asked if known.over_seeds("paper", b, "linear")), study.budget)
    gains = [b for b in asked if known.gain(b, "tenth")]
    gain = known.gain(gains[0], "tenth") if gains else None
    values = {
        "knn": known.over_seeds("paper", budget, "knn"),
        "linear": known.over_seeds("paper", budget, "linear"),
        "scratch_gain_10pct": gain,
    }
    told = " ".join(
        f"{name}={UNKNOWN if value is None else f'{value.mean:.3f}'}"
        for name, value in values.items()
    )
    return f"evidence {told} seeds={len(known.seeds('paper', study.budget))} budget={budget}"


def compared(study: Study, rows: Mapping[Key, Row]) -> str:
    """Write the table of all arms at the same budget."""
    known = Known(rows)
    shown = list(FIGURES)
    lines = [_row(["", *(FIGURES[f] for f in shown), "epochs", "TFLOP", "seeds", "again by"])]
    lines.append(_row(["---"] + ["---:"] * (len(shown) + 3) + ["---"]))
    for arm in ARMS:
        budget = study.budget_of(arm)
        asked = figures_of(arm)
        cells = [
            _shown(known.over_seeds(arm.name, budget, figure), figure) if figure in asked else ""
            for figure in shown
        ]
        seeds = known.seeds(arm.name, budget)
        lines.append(
            _row([arm.title, *cells, *_cost(known, arm, budget), *_again(arm, budget, seeds)])
        )
    return "\n".join(lines)


def curve(study: Study, rows: Mapping[Key, Row]) -> str:
    """Write the table of what more computing gives."""
    known = Known(rows)
    shown = ["knn", "linear", "tenth", "position", "location", "rank"]
    lines = [_row(["", "budget", *(FIGURES[f] for f in shown), "epochs", "TFLOP", "seeds"])]
    lines.append(_row(["---", "---:"] + ["---:"] * (len(shown) + 3)))
    for name in study.curve_arms:
        arm = BY_NAME[name]
        for budget in sorted({study.budget, *study.curve}):
            if not (seeds := known.seeds(name, budget)):
                continue
            cells = [_shown(known.over_seeds(name, budget, figure), figure) for figure in shown]
            cost = _cost(known, arm, budget)
            lines.append(_row([arm.title, str(budget), *cells, *cost, str(len(seeds))]))
    return "\n".join(lines)


def gains(study: Study, rows: Mapping[Key, Row]) -> str:
    """Write what pre-training adds to training from scratch."""
    known = Known(rows)
    lines = [_row(["budget", FIGURES["tenth"], FIGURES["all"]]), _row(["---:"] * 3)]
    for budget in sorted({study.budget, *study.curve}):
        found = [known.gain(budget, figure) for figure in ("tenth", "all")]
        if any(found):
            lines.append(_row([str(budget), *(_points(value) for value in found)]))
    return "\n".join(lines)


def ablated(trials: Sequence[Trial], recipe: Recipe) -> str:
    """Write the published setting beside each other one."""
    lines = [_row(["published", "beside", "20 nearest neighbours", "the paper's direction"])]
    lines.append(_row(["---", "---", "---:", "---"]))
    for found in compare(trials, recipe):
        points = Estimate(found.difference, found.half, 1)
        lines.append(_row([found.question, found.other, _points(points), found.verdict]))
    return "\n".join(lines)


def fill(page: Path, study: Study, rows: Mapping[Key, Row], trials: Sequence[Trial] = ()) -> None:
    """Put the tables between the page's markers.

    Raises:
        DataError: If the page lacks a marker.
    """
    text = page.read_text()
    tables = {
        "compared": compared(study, rows),
        "curve": curve(study, rows),
        "gains": gains(study, rows),
        "ablated": ablated(trials, load_recipe(RECIPE)),
    }
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
        if found != 1:
            raise DataError(
                f"{page} has {found} places for the table {name}; expected one, between "
                f"<!-- {name} --> and <!-- end -->"
            )
    page.write_text(text)


def _shown(value: Estimate | None, figure: str) -> str:
    if value is None:
        return UNKNOWN
    return str(value) if figure in SHARES else value.plain


def _points(value: Estimate | None) -> str:
    return UNKNOWN if value is None else f"{'+' * (value.mean > 0)}{value} points"


def _cost(known: Known, arm: Arm, budget: int) -> list[str]:
    row = known.any_of(arm.name, budget)
    return ["0", "0"] if row is None else [str(row.epochs), f"{row.gflops / 1e3:,.0f}"]


def _again(arm: Arm, budget: int, seeds: Iterable[int]) -> list[str]:
    known = list(seeds)
    if not known:
        return ["0", UNKNOWN]
    names = " ".join(f"{arm.name}/{budget}/{seed}" for seed in known)
    return [str(len(known)), f"`droppos evidence --only {names}`"]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
