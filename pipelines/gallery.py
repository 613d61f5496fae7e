"""The pictures of a run: what it answers, how it came there, and what its encoder sees."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from droppos.config import Grid
from droppos.draw.attention import draw_attention
from droppos.draw.confusion import draw_confusion
from droppos.draw.curves import Series, draw_curves
from droppos.draw.features import draw_features
from droppos.draw.reassembly import Reassembly, draw_reassembly
from droppos.errors import DataError
from droppos.measure.attention import class_attention
from droppos.measure.components import components, patch_features
from droppos.measure.position import (
    PositionMeter,
    PositionReport,
    measure_positions,
    position_predictor,
    protocol_draw,
)
from droppos.model import DropPos
from pipelines.holdout import Pictures, spread
from pipelines.recipe import MeasureProtocol

ROWS = 4
"""Photographs of the reassembly, and of attention."""
COLOURED = 9
"""Photographs whose features are drawn as colours."""

History = Callable[[str], Sequence[tuple[int, float]]]
"""Gives steps and values of a metric by its name; none if it was never logged."""


def draw_gallery(
    model: DropPos, measure: MeasureProtocol, pictures: Pictures, history: History, folder: Path
) -> tuple[PositionReport, list[Path]]:
    """Draw a run: its answers to held-out pictures, what its encoder sees in them, its curves.

    Returns:
        The measurement of its answers, and the files drawn.
    """
    report, files = draw_answers(model, measure, pictures, folder)
    curves = folder / "curves.png"
    draw_curves(
        series(history, train="train/position_loss_nats", holdout=None),
        series(history, train="train/position_accuracy", holdout="holdout/position/accuracy"),
        measure.counts(model.grid),
        curves,
    )
    return report, [*files, curves, *draw_sight(model.encoder, model.grid, pictures, folder)[0]]


def draw_answers(
    model: DropPos, measure: MeasureProtocol, pictures: Pictures, folder: Path
) -> tuple[PositionReport, list[Path]]:
    """Ask the model for positions on held-out pictures, and draw its answers.

    Returns:
        The measurement, and the files drawn: reassembly and confusion.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = measure.counts(model.grid)
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
    files = [folder / f"{name}.png" for name in ("reassembly", "confusion")]
    draw_reassembly(rows, model.grid, counts.chance, files[0])
    draw_confusion(report.offsets, report.beside_chance, files[1])
    return report, files


def draw_sight(
    encoder: VisionTransformer, grid: Grid, pictures: Pictures, folder: Path
) -> tuple[list[Path], list[str]]:
    """Draw what an encoder in eval mode looks at, and which patches it finds alike.

    Returns:
        The files drawn, attention and features; and what could not be, with the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png" for name in ("attention", "features")]
    some = pictures.pixels[spread(len(pictures.pixels), ROWS)]
    draw_attention(some.numpy(), class_attention(encoder, some).numpy(), grid, files[0])
    some = pictures.pixels[spread(len(pictures.pixels), COLOURED)]
    try:
        found = components(patch_features(encoder, some))
    except DataError as error:
        return files[:1], [f"features as colours: {error}"]
    colours = found.colours.numpy()
    draw_features(some.numpy(), colours, found.explained, found.place, grid, files[1])
    return files, []


def series(history: History, train: str, holdout: str | None) -> list[Series]:
    """Take the curves of one panel from the history, those that have a point."""
    named = {"training": train, "held out": holdout}
    return [
        Series(label, *zip(*points, strict=True))
        for label, name in named.items()
        if name is not None and (points := history(name))
    ]
