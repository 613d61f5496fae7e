"""The pictures of a search's report, or in a sentence why one is missing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import cast

from matplotlib.figure import Figure

from droppos.draw.search import ENOUGH, draw_fields, draw_parallel
from droppos.draw.search_maps import PARTS, draw_courses, draw_importance, draw_map
from droppos.draw.trials import Axis, Trial
from pipelines.findings import Findings, Row
from pipelines.ranking import FEWEST_TRUSTED, importances
from pipelines.space import Dimension, Value
from pipelines.verdict import figure_label, setting

SCHEDULED = "Values changed while trials ran, so a score is not that of a trial's last ones."
MASK, DROP = "method.mask_ratio", "method.position_mask_ratio"


@dataclass(frozen=True, slots=True)
class Part:
    """One figure of the report, or why there is none."""

    title: str
    drawn: Figure | str
    """The figure; or a sentence."""
    alt: str = ""
    caption: str = ""


def search_figures(findings: Findings) -> dict[str, Figure]:
    """Draw the report's figures by name, those that can be drawn."""
    return {
        name: part.drawn
        for name, part in search_parts(findings).items()
        if isinstance(part.drawn, Figure)
    }


def search_parts(findings: Findings) -> dict[str, Part]:
    """Draw the report's figures by name, in its order."""
    return {
        "parallel": parallel_part(findings),
        "fields": fields_part(findings),
        "ratios": ratios_part(findings),
        "importance": importance_part(findings),
        "courses": courses_part(findings),
    }


def parallel_part(findings: Findings) -> Part:
    """Draw all trials at once, over all fields."""
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


def fields_part(findings: Findings) -> Part:
    """Draw each field against the objective."""
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
            f"of the finished trials at a listed value; along a range, of each quarter of them, if "
            f"they are {ENOUGH} or more. The other fields vary from dot to dot."
        ),
    )


def ratios_part(findings: Findings) -> Part:
    """Draw one ratio by the other, where both were searched."""
    title = "Drop ratio by mask ratio"
    by_name = {dimension.field: dimension for dimension in findings.dimensions}
    absent = [name for name in (MASK, DROP) if name not in by_name]
    if absent:
        was = "was" if len(absent) == 1 else "were"
        return Part(title, f"{' and '.join(absent)} {was} not searched.")
    if not findings.finished:
        return Part(title, "No trial has finished.")
    if findings.scheduled:
        return Part(title, SCHEDULED)
    pair = [by_name[MASK], by_name[DROP]]
    axes = [_axis(dimension, findings.rows) for dimension in pair]
    axes[1] = replace(axes[1], label=f"{axes[1].label}\n(drop ratio)")
    ranges = "" if all(axis.listed for axis in axes) else f" Ranges are cut into {PARTS} parts."
    label = figure_label(findings.objective)
    return Part(
        title,
        draw_map(axes[0], axes[1], _drawn(findings, pair)),
        alt=f"Heat map of the median {label} by mask ratio and drop ratio.",
        caption=(
            f"Median {label} of the finished trials in each cell, and how many they are; framed: "
            f"where the best trial is.{ranges} Other fields vary within a cell."
        ),
    )


def importance_part(findings: Findings) -> Part:
    """Draw which field explains the differences."""
    title = "Which field matters"
    if findings.scheduled:
        return Part(title, SCHEDULED)
    names = [dimension.field for dimension in findings.dimensions]
    done = [row for row in findings.finished if all(name in row.point for name in names)]
    values = [findings.objective_of(row) or 0.0 for row in done]
    shares = importances(findings.dimensions, [row.point for row in done], values)
    if isinstance(shares, str):
        return Part(title, shares)
    trusted = len(done) >= FEWEST_TRUSTED
    doubt = "" if trusted else f" With fewer than {FEWEST_TRUSTED} it is not to be trusted."
    said = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return Part(
        title,
        draw_importance(shares, trusted=trusted),
        alt=f"Importance of each field: {said}.",
        caption=(
            f"Share of the objective's variation that each field explains over what was searched "
            f"(functional ANOVA). It stands on {len(done)} finished trials.{doubt}"
        ),
    )


def courses_part(findings: Findings) -> Part:
    """Draw how trials went."""
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


def _axis(dimension: Dimension, rows: Sequence[Row]) -> Axis:
    """Draw a field over all that was searched, and whatever else a trial had."""
    name = dimension.field
    label = name.rpartition(".")[2]
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
            history=[(step, value) for step, value in row.history if isfinite(value)],
        )
        for row in findings.rows
        if all(name in row.point for name in names)
    ]


def _unmeasured(findings: Findings) -> str | None:
    if any(findings.objective_of(row) is not None for row in findings.rows):
        return None
    return "No trial has a measured objective yet."
