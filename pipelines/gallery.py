"""The pictures of a run: reassembly, confusion and curves, drawn from what was trained."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from droppos.draw.confusion import draw_confusion
from droppos.draw.curves import Series, draw_curves
from droppos.draw.reassembly import Reassembly, draw_reassembly
from droppos.measure.position import (
    PositionMeter,
    PositionReport,
    measure_positions,
    position_predictor,
    protocol_draw,
)
from droppos.model import DropPos
from pipelines.holdout import Pictures, protocol, spread
from pipelines.recipe import Measure

ROWS = 4
"""Photographs of the reassembly."""

History = Callable[[str], Sequence[tuple[int, float]]]
"""Gives steps and values of a metric by its name; none if it was never logged."""


def draw_gallery(
    model: DropPos, measure: Measure, pictures: Pictures, history: History, folder: Path
) -> tuple[PositionReport, list[Path]]:
    """Ask the model for positions on held-out pictures, and draw its answers.

    Returns:
        The measurement, and the files drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = protocol(measure).counts(model.grid)
    predict = position_predictor(model)
    meter = PositionMeter(model.grid, counts)
    report = measure_positions(predict, pictures.pixels, meter, seed=measure.seed).report()

    rows = []
    for i in spread(len(pictures.pixels), ROWS):
        drawn = protocol_draw(counts, range(i, i + 1), measure.seed)
        with torch.no_grad():
            logits = predict(pictures.pixels[i : i + 1], drawn)[0]
        rows.append(
            Reassembly.from_logits(
                pictures.pixels[i].numpy(),
                drawn.visible[0].numpy(),
                drawn.scored[0].numpy(),
                logits.numpy(),
            )
        )
    files = [folder / f"{name}.png" for name in ("reassembly", "confusion", "curves")]
    draw_reassembly(rows, model.grid, counts.chance, files[0])
    draw_confusion(report.offsets, report.beside_chance, files[1])
    draw_curves(
        series(history, train="train/position_loss_nats", holdout=None),
        series(history, train="train/position_accuracy", holdout="holdout/position/accuracy"),
        counts,
        files[2],
    )
    return report, files


def series(history: History, train: str, holdout: str | None) -> list[Series]:
    """Take the curves of one panel from the history, those that have a point."""
    named = {"training": train, "held out": holdout}
    return [
        Series(label, *zip(*points, strict=True))
        for label, name in named.items()
        if name is not None and (points := history(name))
    ]
