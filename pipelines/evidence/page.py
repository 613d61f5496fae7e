"""What the raw results come to: the tables of docs/evidence.md, and the line for scripts.

The page's words are written by people; the tables between its markers are written here, so that
no number on it is typed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from droppos.errors import DataError
from pipelines.evidence.ablations import Trial, compare
from pipelines.evidence.arms import ARMS, BY_NAME, FIGURES, Arm, figures_of
from pipelines.evidence.known import Known
from pipelines.evidence.outlook import outlooks
from pipelines.evidence.results import Estimate, Key, Row
from pipelines.evidence.study import Study
from pipelines.evidence.tables import replace_file

SCRATCH = {"random": "the same from scratch", "supervised": "as much computing from scratch"}
"""What pre-training is held against: the same fine-tuning, and the same computing in all."""
SHARES = ("knn", "linear", "blocks", "tenth", "all", "position", "location")
"""Figures that are shares, shown in percent."""
UNKNOWN = "?"


def line(study: Study, rows: Mapping[Key, Row]) -> str:
    """Tell scripts of DropPos as published, at the largest budget where all is known."""
    known = Known(rows)

    def found(budget: int) -> dict[str, Estimate | None]:
        return {
            "knn": known.over_seeds("paper", budget, "knn"),
            "linear": known.over_seeds("paper", budget, "linear"),
            "scratch_gain_10pct": known.gain("paper", budget, "tenth"),
        }

    whole = (budget for budget in reversed(study.budgets) if all(found(budget).values()))
    budget = next(whole, study.budget)
    told = " ".join(
        f"{name}={UNKNOWN if value is None else f'{value.mean:.3f}'}"
        for name, value in found(budget).items()
    )
    return f"evidence {told} seeds={len(known.seeds('paper', budget))} budget={budget}"


def compared(study: Study, rows: Mapping[Key, Row]) -> str:
    """Write the table of all arms at the same budget."""
    known = Known(rows)
    shown = tuple(FIGURES)
    lines = [_row(["", *(FIGURES[f] for f in shown), "epochs", "TFLOP", "seeds", "again by"])]
    lines.append(_row(["---"] + ["---:"] * (len(shown) + 3) + ["---"]))
    for arm in ARMS:
        budget = study.budget_of(arm)
        found = _found(known, arm, budget, shown)
        cost, again = _cost(known, arm, budget), _again(arm, budget, known)
        lines.append(_row([arm.title, *_cells(found), *cost, _seeds(found.values()), again]))
    return "\n".join(lines)


def differences(study: Study, rows: Mapping[Key, Row]) -> str:
    """Write the table of what DropPos (paper) has over each other arm, seed by seed."""
    known = Known(rows)
    shown = ("knn", "linear", "blocks", "tenth", "all", "location")
    lines = [_row(["DropPos (paper) less", *(FIGURES[figure] for figure in shown), "seeds"])]
    lines.append(_row(["---"] + ["---:"] * (len(shown) + 1)))
    for arm in ARMS:
        budget = study.budget_of(arm)
        pairs = [
            known.paired(("paper", study.budget), (arm.name, budget), figure) for figure in shown
        ]
        if arm.name == "paper" or not any(pairs):
            continue
        lines.append(_row([arm.title, *(_points(pair) for pair in pairs), _seeds(pairs)]))
    return "\n".join(lines)


def curve(study: Study, rows: Mapping[Key, Row]) -> str:
    """Write the table of what more computing gives."""
    known = Known(rows)
    shown = ("knn", "linear", "blocks", "tenth", "position", "location", "rank")
    lines = [_row(["", "budget", *(FIGURES[f] for f in shown), "epochs", "TFLOP", "seeds"])]
    lines.append(_row(["---", "---:"] + ["---:"] * (len(shown) + 3)))
    for name in study.curve_arms:
        arm = BY_NAME[name]
        for budget in study.budgets:
            found = _found(known, arm, budget, shown)
            if any(found.values()):
                cost = _cost(known, arm, budget)
                lines.append(
                    _row([arm.title, str(budget), *_cells(found), *cost, _seeds(found.values())])
                )
    return "\n".join(lines)


def gains(study: Study, rows: Mapping[Key, Row]) -> str:
    """Write what pre-training adds to training from scratch, at equal fine-tuning and in all."""
    known = Known(rows)
    shown = ("tenth", "all")
    titles = [f"{FIGURES[figure]}, less {less}" for less in SCRATCH.values() for figure in shown]
    lines = [_row(["", "budget", *titles, "seeds"])]
    lines.append(_row(["---"] + ["---:"] * (len(titles) + 2)))
    for arm in study.curve_arms:
        for budget in study.budgets:
            found = [
                known.paired((arm, budget), (less, budget if BY_NAME[less].trained else 0), figure)
                for less in SCRATCH
                for figure in shown
            ]
            if any(found):
                points = ["" if value is None else _points(value) for value in found]
                lines.append(_row([BY_NAME[arm].title, str(budget), *points, _seeds(found)]))
    return "\n".join(lines)


def outlook(study: Study, rows: Mapping[Key, Row]) -> str:
    """Write how far each arm of the curve is from what was hoped for."""
    lines = [
        _row(["", "", "hoped for", "now", "mean of a doubling", "doublings left", "TFLOP"]),
        _row(["---", "---"] + ["---:"] * 5),
    ]
    for found in outlooks(study, rows):
        left = "none in sight" if found.doublings is None else f"{found.doublings:.1f}"
        left = "reached" if found.doublings == 0 else left
        needed = "" if found.needed is None else f"{found.needed:,.0f}"
        cells = [f"{100 * found.hoped:.0f}", f"{100 * found.now:.1f}"]
        pace = f"{100 * found.per_doubling:+.1f} points"
        title, figure = BY_NAME[found.arm].title, FIGURES[found.figure]
        lines.append(_row([title, figure, *cells, pace, left, needed]))
    return "\n".join(lines)


def ablated(trials: Sequence[Trial]) -> str:
    """Write what the paper chose beside each other setting."""
    titles = ["the paper's choice", "less", FIGURES["knn"], "leans", FIGURES["position"]]
    lines = [_row(titles), _row(["---", "---", "---:", "---", "---:"])]
    for found in compare(trials):
        points = _points(Estimate(found.difference, found.half, 1))
        skill = _points(Estimate(found.position, None, 1))
        lines.append(_row([found.question, found.other, points, found.verdict, skill]))
    return "\n".join(lines)


def fill(page: Path, study: Study, rows: Mapping[Key, Row], trials: Sequence[Trial] = ()) -> None:
    """Put the tables between the page's markers.

    Raises:
        DataError: If the page lacks a marker.
    """
    text = page.read_text()
    tables = {
        "compared": compared(study, rows),
        "differences": differences(study, rows),
        "curve": curve(study, rows),
        "outlook": outlook(study, rows),
        "gains": gains(study, rows),
        "ablated": ablated(trials),
    }
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
        if found != 1:
            raise DataError(
                f"{page} has {found} places for the table {name}; expected one, between "
                f"<!-- {name} --> and <!-- end -->"
            )
    replace_file(page, text)


def _found(
    known: Known, arm: Arm, budget: int, shown: Sequence[str]
) -> dict[str, Estimate | Literal[""] | None]:
    """Give figures by name: none is not known yet, and an empty one is not asked of the arm."""
    asked = figures_of(arm)
    return {
        figure: known.over_seeds(arm.name, budget, figure) if figure in asked else ""
        for figure in shown
    }


def _cells(found: Mapping[str, Estimate | Literal[""] | None]) -> list[str]:
    return ["" if value == "" else _shown(value, figure) for figure, value in found.items()]


def _seeds(found: Iterable[Estimate | Literal[""] | None]) -> str:
    """Tell of how many seeds figures are; while a study is under way, not all are of as many."""
    counts = {value.seeds for value in found if value}
    return (
        " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "0"
    )


def _shown(value: Estimate | None, figure: str) -> str:
    if value is None:
        return UNKNOWN
    return str(value) if figure in SHARES else value.plain


def _points(value: Estimate | None) -> str:
    return UNKNOWN if value is None else f"{'+' * (value.mean > 0)}{value} points"


def _cost(known: Known, arm: Arm, budget: int) -> list[str]:
    row = known.any_of(arm.name, budget)
    return ["0", "0"] if row is None else [str(row.epochs), f"{row.gflops / 1e3:,.0f}"]


def _again(arm: Arm, budget: int, known: Known) -> str:
    names = [f"{arm.name}/{budget}/{seed}" for seed in known.seeds(arm.name, budget)]
    return f"`droppos evidence --only {' '.join(names)} --again`" if names else UNKNOWN


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
