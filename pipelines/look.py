"""Look: a backbone's pictures, and whether it takes shortcuts."""

from dataclasses import dataclass
from pathlib import Path

from droppos.config import Heads
from droppos.errors import ConfigError, DataError
from droppos.measure.position import PositionReport, position_predictor
from droppos.measure.shortcuts import ShortcutReport, measure_shortcuts
from droppos.model import DropPos
from pipelines.backbone import open_backbone
from pipelines.gallery import draw_answers, draw_sight
from pipelines.holdout import Pictures, load_pictures
from pipelines.recipe import MeasureProtocol, Tracking
from pipelines.scores import track_figures
from pipelines.storage import open_place

WHOLE = 1.0
"""Side of what is looked at for shortcuts, over the largest crop that fits: borders are outside of
what is measured otherwise."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was drawn and found."""

    pictures: list[Path]
    position: PositionReport | None
    """None for a backbone without a position head; then there are no shortcuts, either."""
    shortcuts: ShortcutReport | None
    notes: list[str]
    """What could not be looked at, and why."""
    backbone: str
    """Place of what was looked at, written out."""
    data: str


def look(
    backbone: str,
    data: str,
    out: Path,
    *,
    measure: MeasureProtocol,
    heads: Heads = Heads(),  # noqa: B008 - frozen
) -> Look:
    """Draw what a backbone makes of a data set, and look for shortcuts.

    Args:
        backbone: Export, checkpoint or run.
        data: Prepared data set that it was not trained on.
        out: Folder of the PNGs; made if missing.
        measure: The protocol, and how many pictures.
        heads: Attention heads, for weights of another project that don't tell.

    Raises:
        DataError: If backbone or data cannot be read.
    """
    trained = open_backbone(backbone, heads)
    size = trained.model.image_size
    seen = (trained.uri, open_place(data).uri)
    pictures = load_pictures(data, size, measure.pictures)
    files, notes = draw_sight(trained.encoder, trained.model.grid, pictures, out)
    if trained.droppos is None:
        notes.append("reassembly, confusion, shortcuts: this backbone has no position head")
        return Look(files, None, None, notes, *seen)
    position, answers = draw_answers(trained.droppos, measure, pictures, out)
    files = answers + files
    whole = load_pictures(data, size, measure.pictures, ratio=WHOLE)
    try:
        shortcuts = find_shortcuts(trained.droppos, measure, whole)
    except (ConfigError, DataError) as error:
        return Look(files, position, None, [*notes, f"shortcuts: {error}"], *seen)
    return Look(files, position, shortcuts, notes, *seen)


def track(seen: Look, tracking: Tracking) -> str:
    """Write what was found of shortcuts to MLflow; return the run's identifier.

    Raises:
        ConfigError: If MLflow cannot be reached, or nothing was found.
    """
    if seen.shortcuts is None:
        raise ConfigError(
            f"there is nothing of {seen.backbone} to track: {'; '.join(seen.notes)}; leave --track "
            "out"
        )
    return track_figures(
        seen.shortcuts.metrics(),
        backbone=seen.backbone,
        data=seen.data,
        facts={"shortcuts": seen.shortcuts.verdict},
        tracking=tracking,
    )


def find_shortcuts(model: DropPos, measure: MeasureProtocol, pictures: Pictures) -> ShortcutReport:
    """Look for shortcuts under the protocol.

    Args:
        model: With a position head, in eval mode, on the CPU.
        measure: The protocol.
        pictures: Held-out ones with their outermost pixels (`WHOLE`).

    Raises:
        ConfigError: If the grid is too small.
        DataError: If there are too few pictures.
    """
    return measure_shortcuts(
        position_predictor(model),
        pictures.pixels,
        model.grid,
        measure.counts(model.grid),
        seed=measure.seed,
    )
