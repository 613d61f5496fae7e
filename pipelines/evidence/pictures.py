"""The pictures of docs/evidence.md, drawn from the raw results."""

from collections.abc import Mapping
from pathlib import Path

from droppos.draw.evidence import Bar, Course, Level, draw_bars, draw_courses
from pipelines.evidence.arms import ARMS, BY_NAME, FIGURES
from pipelines.evidence.known import Known
from pipelines.evidence.results import Key, Row
from pipelines.evidence.study import Study


def draw(study: Study, rows: Mapping[Key, Row], out: Path) -> list[Path]:
    """Draw what is known so far.

    Returns:
        The PNGs that were drawn.
    """
    known = Known(rows)
    drawn = []
    if panels := [
        p for f in ("knn", "linear", "blocks", "tenth", "location") if (p := _bars(study, known, f))
    ]:
        drawn.append(out / "compared.png")
        draw_bars(panels, drawn[-1])
    if panels := [
        p for f in ("knn", "linear", "blocks", "tenth") if (p := _course(study, known, f))
    ]:
        drawn.append(out / "curve.png")
        draw_courses(panels, drawn[-1])
    return drawn


def _bars(study: Study, known: Known, figure: str) -> tuple[str, list[Bar]] | None:
    bars = [
        Bar(arm.title, found.mean, found.half, arm.kind != "pre-trained")
        for arm in ARMS
        if (found := known.over_seeds(arm.name, study.budget_of(arm), figure))
    ]
    return (FIGURES[figure], bars) if bars else None


def _course(
    study: Study, known: Known, figure: str
) -> tuple[str, list[Course], list[Level]] | None:
    courses = []
    for name in study.curve_arms:
        points = known.course(name, study.budgets, figure)
        if len(points) > 1:
            courses.append(Course(BY_NAME[name].title, *map(list, zip(*points, strict=True))))
    levels = [
        Level(BY_NAME[name].title, found.mean)
        for name in ("raw", "random")
        if (found := known.over_seeds(name, 0, figure))
    ]
    return (FIGURES[figure], courses, levels) if courses else None
