"""The report of a search: one HTML file that says which setting wins, and shows why."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import cast

from matplotlib.figure import Figure

from droppos.draw.search import Axis, Trial, draw_fields, draw_parallel, words
from droppos.draw.search_maps import PARTS, draw_courses, draw_importance, draw_map
from pipelines.findings import Findings, Row
from pipelines.page import Cell, missing, page, paragraph, picture, section, table
from pipelines.ranking import (
    FEWEST_RANKED,
    FEWEST_TRUSTED,
    correlations,
    could_be_chance,
    importances,
    smaller_is_better,
)
from pipelines.space import Dimension, Value
from pipelines.verdict import STATES, figure_label, setting, verdict

MASK, DROP = "method.mask_ratio", "method.position_mask_ratio"
LABELS = {DROP: "position_mask_ratio (drop ratio)"}

__all__ = ["Findings", "Row", "search_figures", "search_report"]


@dataclass(frozen=True, slots=True)
class Part:
    """One figure of the report, or why there is none."""

    title: str
    drawn: Figure | str
    """The figure; or a sentence."""
    alt: str = ""
    caption: str = ""

    @property
    def html(self) -> str:
        """Write it as a section of the page."""
        if isinstance(self.drawn, str):
            return section(self.title, missing(self.drawn))
        return section(self.title, picture(self.drawn, self.alt, self.caption))


def search_report(findings: Findings) -> str:
    """Write what a search found as a page that needs nothing else."""
    parts = _parts(findings)
    return page(
        f"Search {findings.name}",
        [
            "<header>",
            f"<h1>Search {escape(findings.name)}</h1>",
            paragraph(findings.protocol, "soft"),
            '<div class="verdict">',
            *(paragraph(sentence) for sentence in verdict(findings)),
            "</div>",
            _notes(findings),
            "</header>",
            "<main>",
            *(part.html for part in parts.values()),
            _agreement(findings),
            _trials(findings),
            _sharing(findings),
            _best(findings),
            "</main>",
        ],
    )


def search_figures(findings: Findings) -> dict[str, Figure]:
    """Draw the report's figures by name, those that can be drawn."""
    return {
        name: part.drawn
        for name, part in _parts(findings).items()
        if isinstance(part.drawn, Figure)
    }


def _parts(findings: Findings) -> dict[str, Part]:
    return {
        "parallel": _parallel(findings),
        "fields": _fields(findings),
        "ratios": _ratios(findings),
        "importance": _importance(findings),
        "courses": _courses(findings),
    }


def _axis(dimension: Dimension, rows: Sequence[Row]) -> Axis:
    """Draw a field over all that was searched, and whatever else a trial had."""
    name = dimension.field
    label = LABELS.get(name, name.rpartition(".")[2])
    seen = [row.point[name] for row in rows if name in row.point]
    every = list(dict.fromkeys([*dimension.values, *seen]))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in every)
    if dimension.listed:
        return Axis(label, tuple(sorted(every, key=_number) if numbers else every), listed=True)
    low, high = min(map(_number, every)), max(map(_number, every))
    return Axis(label, (low, high), listed=False, log=dimension.kind == "loguniform")


def _number(value: Value) -> float:
    return cast(float, value)


def _drawn(findings: Findings, dimensions: Sequence[Dimension]) -> list[Trial]:
    """Take the trials that have a value of each field."""
    names = [dimension.field for dimension in dimensions]
    best = findings.winner
    return [
        Trial(
            name=row.name,
            point=tuple(row.point[name] for name in names),
            objective=findings.objective_of(row),
            done=row.state == "finished",
            best=row is best,
            history=row.history,
        )
        for row in findings.rows
        if all(name in row.point for name in names)
    ]


def _unmeasured(findings: Findings) -> str | None:
    if any(findings.objective_of(row) is not None for row in findings.rows):
        return None
    return "No trial has a measured objective yet."


def _parallel(findings: Findings) -> Part:
    title = "All trials at a glance"
    if reason := _unmeasured(findings):
        return Part(title, reason)
    axes = [_axis(dimension, findings.rows) for dimension in findings.dimensions]
    trials = _drawn(findings, findings.dimensions)
    best = findings.winner
    label = figure_label(findings.objective)
    return Part(
        title,
        draw_parallel(axes, trials, label),
        alt=(
            f"Parallel coordinates of {len(trials)} trials over "
            f"{', '.join(axis.label for axis in axes)} and {label}. "
            + (f"The best has {setting(best)}." if best else "")
        ),
        caption=(
            "A line is a trial, from its settings on the left to its objective on the right. "
            "Orange: the best. Dark: good. Grey: did not run to its end, so its objective was "
            "measured after fewer steps."
        ),
    )


def _fields(findings: Findings) -> Part:
    title = "Each field by itself"
    if reason := _unmeasured(findings):
        return Part(title, reason)
    axes = [_axis(dimension, findings.rows) for dimension in findings.dimensions]
    label = figure_label(findings.objective)
    return Part(
        title,
        draw_fields(axes, _drawn(findings, findings.dimensions), label),
        alt=f"{label} against each of {', '.join(axis.label for axis in axes)}.",
        caption=(
            "A dot is a trial; orange: the best, hollow: did not run to its end. Bars are medians "
            "of the finished trials at a listed value, or in a quarter of them along a range. The "
            "other fields vary from dot to dot."
        ),
    )


def _ratios(findings: Findings) -> Part:
    title = "Drop ratio by mask ratio"
    by_name = {dimension.field: dimension for dimension in findings.dimensions}
    absent = [name for name in (MASK, DROP) if name not in by_name]
    if absent:
        was = "was" if len(absent) == 1 else "were"
        return Part(title, f"{' and '.join(absent)} {was} not searched.")
    if not findings.finished:
        return Part(title, "No trial has finished.")
    pair = [by_name[MASK], by_name[DROP]]
    axes = [_axis(dimension, findings.rows) for dimension in pair]
    ranges = "" if all(axis.listed for axis in axes) else f" Ranges are cut into {PARTS} parts."
    label = figure_label(findings.objective)
    return Part(
        title,
        draw_map(axes[0], axes[1], _drawn(findings, pair)),
        alt=f"Heat map of the median {label} by {axes[0].label} and {axes[1].label}.",
        caption=(
            f"Median {label} of the finished trials in each cell, and how many they are; framed: "
            f"where the best trial is.{ranges} Other fields vary within a cell."
        ),
    )


def _importance(findings: Findings) -> Part:
    title = "Which field matters"
    names = [dimension.field for dimension in findings.dimensions]
    done = [row for row in findings.finished if all(name in row.point for name in names)]
    values = [findings.objective_of(row) or 0.0 for row in done]
    shares = importances(findings.dimensions, [row.point for row in done], values)
    if isinstance(shares, str):
        return Part(title, shares)
    trusted = len(done) >= FEWEST_TRUSTED
    doubt = "" if trusted else f" With fewer than {FEWEST_TRUSTED} it is not to be trusted."
    labelled = {LABELS.get(name, name): share for name, share in shares.items()}
    said = ", ".join(f"{name} {share:.0%}" for name, share in labelled.items())
    return Part(
        title,
        draw_importance(labelled, trusted=trusted),
        alt=f"Importance of each field: {said}.",
        caption=(
            f"Share of the objective's variation that each field explains over what was searched "
            f"(functional ANOVA). It stands on {len(done)} finished trials.{doubt}"
        ),
    )


def _courses(findings: Findings) -> Part:
    title = "How trials went"
    trials = _drawn(findings, ())
    if not any(len(trial.history) > 1 for trial in trials):
        return Part(title, "No trial was measured more than once, so there is no course to draw.")
    label = figure_label(findings.objective)
    return Part(
        title,
        draw_courses(trials, label),
        alt=f"{label} over the optimizer steps, one line a trial.",
        caption="Orange: the best. Dark: good at the end. Grey, with a cross: did not run to its "
        "end.",
    )


def _agreement(findings: Findings) -> str:
    title = "Do cheap figures rank trials as dear ones do?"
    figures = [
        {name: value for name in row.figures if (value := row.figure(name)) is not None}
        for row in findings.rows
        if row.state == "finished"
    ]
    pairs = correlations(figures)
    if not pairs:
        return section(
            title,
            missing(f"It takes two figures that {FEWEST_RANKED} finished trials have both."),
        )
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    both = pairs | {(second, first): found for (first, second), found in pairs.items()}
    head = [Cell("", wide=True), *(Cell(_signed(name)) for name in names)]
    rows = [
        ("", [Cell(_signed(name), wide=True), *(_agreed(both, name, other) for other in names)])
        for name in names
    ]
    return section(
        title,
        table(
            head,
            rows,
            "Spearman's rank correlation over finished trials, and how many have both figures: 1 "
            "is the same order, 0 none, -1 the opposite. Smaller is better for training excess "
            "nats and losses, so their sign is turned. In brackets: so few trials could agree so "
            "well by chance.",
        ),
    )


def _signed(name: str) -> str:
    return figure_label(name) + (" (sign turned)" if smaller_is_better(name) else "")


def _agreed(
    pairs: dict[tuple[str, str], tuple[float | None, int]], first: str, second: str
) -> Cell:
    if first == second:
        return Cell("1", "color:#a3a8b0")
    found, trials = pairs.get((first, second), (None, 0))
    if trials == 0:
        return Cell("too few")
    if found is None:
        return Cell(f"equal values, n {trials}")
    if could_be_chance(found, trials):
        return Cell(f"({found:.2f}), n {trials}", "color:#5d626b")
    colour = "47,109,181" if found > 0 else "213,94,0"
    return Cell(f"{found:.2f}, n {trials}", f"background:rgba({colour},{0.45 * abs(found):.2f})")


def _trials(findings: Findings) -> str:
    if not findings.rows:
        return section("All trials", missing("No trial was run."))
    names = [dimension.field for dimension in findings.dimensions]
    others = dict.fromkeys(name for row in findings.rows for name in row.figures)
    figures = [findings.objective, *(name for name in others if name != findings.objective)]
    head = [
        Cell("trial", wide=True),
        *(Cell(name.rpartition(".")[2].replace("_", "_\u200b"), title=name) for name in names),
        *(Cell(figure_label(name), title=name) for name in figures),
        *(Cell(text) for text in ("steps", "time")),
        Cell("state", wide=True),
    ]
    values = [value for row in findings.rows if (value := findings.objective_of(row)) is not None]
    best = findings.winner
    rows = [
        (
            "best" if row is best else "" if row.state == "finished" else "pale",
            [
                Cell(row.name, title=f"MLflow run {row.tracking_run or 'none'}", wide=True),
                *(Cell(words(row.point[name]) if name in row.point else "") for name in names),
                *(
                    Cell(_figure(row, name), _bar(row, name, values) if not at else "")
                    for at, name in enumerate(figures)
                ),
                Cell(f"{row.step:,}/{row.steps:,}"),
                Cell(_time(row.seconds)),
                Cell(STATES[row.state] + (f": {row.error}" if row.error else ""), wide=True),
            ],
        )
        for row in findings.ranked
    ]
    return section("All trials", table(head, rows, "Best first."))


def _figure(row: Row, name: str) -> str:
    value = row.figure(name)
    return "–" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"  # noqa: RUF001


def _bar(row: Row, name: str, values: Sequence[float]) -> str:
    """Draw the objective behind its number, from the worst trial's to the best's."""
    value = row.figure(name)
    if value is None or max(values) <= min(values):
        return ""
    share = 100 * (value - min(values)) / (max(values) - min(values))
    return f"background:linear-gradient(90deg,#cfe0f1 {share:.0f}%,transparent 0)"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"  # noqa: RUF001
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def _notes(findings: Findings) -> str:
    if not findings.notes:
        return ""
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in findings.notes) + "</ul>"


def _sharing(findings: Findings) -> str:
    title = "One stream for many trials"
    if not findings.sharing:
        return section(title, missing("Trials did not share a stream of pictures."))
    rows = [
        ("", [Cell(name.replace("_", " "), wide=True), Cell(f"{number:,.4g}")])
        for name, number in findings.sharing.items()
    ]
    return section(title, table([Cell("what", wide=True), Cell("number")], rows))


def _best(findings: Findings) -> str:
    title = "The best config"
    if findings.best_yaml is None:
        return section(title, missing("No trial is the best yet, so there is no config to take."))
    return section(
        title,
        paragraph("`droppos pretrain` takes this file as it is.", "soft"),
        f"<pre>{escape(findings.best_yaml)}</pre>",
    )
