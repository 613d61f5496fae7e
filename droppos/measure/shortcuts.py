"""Shortcuts: does the model place patches by what the scene shows, or by what the frame does to it?

Three questions of each cue of place (`droppos.measure.cues`), on pictures never trained on:

- Is it there? How far the cue alone tells a patch's cell, without the model.
- Does it carry? In a chimera each patch stands in its own cell but comes from another picture, so
  there is no scene to go by. What skill is left there, and lost once the cue is taken out of the
  pictures, the cue carried.
- Is it missed? What skill on whole pictures is lost once the cue is taken out.

A shortcut is a cue that is there and of which the model makes use. All is told as a share of the
skill on whole pictures, and comes with an interval over pictures.

What a chimera keeps and no cue explains may be layout, sky above and ground below, which is
content and all right, or a cue that is not among these; the verdict says so.

Axes in this file
    P  pictures
    R  resamples of the set of pictures
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from droppos.config import Counts, Grid
from droppos.errors import ConfigError
from droppos.measure.cues import CUES, Cue, Probe, probe_cues
from droppos.measure.edits import (
    chimera,
    crop_borders,
    flatten_fall_off,
    flatten_marks,
    grey,
    shift_grid,
)
from droppos.measure.position import Predict, protocol_draw

THERE = 2.0
"""Times chance, at the interval's lower end, from which a cue counts as being there. Ordinary
photographs gave 0.3 to 1.0 at that end, light from above among them, planted cues 3.0 to 31. On
photographs it was not chosen on a planted cue was missed at 1.1, and faces reach 5 with none
(docs/shortcuts.md)."""
USED = 0.1
"""Share of the skill that a cue must carry, at the interval's lower end, to be made use of."""
MISSED = 0.35
"""Share of the skill that must be lost without the cue, to be made use of. More than `USED`, for an
edit hurts the scene, too."""
UNEXPLAINED = 0.25
"""Share of the skill that survives without a scene, from which the verdict speaks of it."""
UNDECIDED = 0.6
"""Upper end of that share's interval, from which nothing is said to have been ruled out."""
RESAMPLES = 1000
SMALLEST_GRID = 4
"""Rows and columns below which a frame is all rim."""

NAMES: dict[Cue, str] = {
    "borders": "borders",
    "marks": "fixed marks",
    "fall_off": "lens fall-off",
    "fringes": "colour fringes",
    "grid": "compression grid",
}


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the model's skill, with its 95 % interval over pictures."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"


@dataclass(frozen=True, slots=True)
class CueReport:
    """The evidence for one cue."""

    cue: Cue
    probe: Probe
    """How far it alone tells the cell."""
    carried: Share | None
    """Skill without a scene that is lost without the cue; None if the model has no skill."""
    missed: Share | None
    """Skill on whole pictures that is lost without the cue."""

    @property
    def is_there(self) -> bool:
        """Whether the pictures have it."""
        return self.probe.low > THERE

    @property
    def is_used(self) -> bool:
        """Whether the model makes use of it, or of what the edit takes away with it."""
        if self.carried is None or self.missed is None:
            return False
        return self.carried.low > USED or self.missed.low > MISSED

    @property
    def is_shortcut(self) -> bool:
        """Whether it is there and made use of."""
        return self.is_there and self.is_used

    @property
    def name(self) -> str:
        """What people call it."""
        return NAMES[self.cue]

    @property
    def verdict(self) -> str:
        """Tell in a word or two."""
        if not self.is_there:
            return "not there"
        if self.carried is None:
            return "there"
        return "shortcut" if self.is_used else "there, not used"

    @property
    def weight(self) -> float:
        """Share of the skill that rests on it, by the stronger of two measurements."""
        if self.carried is None or self.missed is None:
            return 0.0
        return max(self.carried.value, self.missed.value)


@dataclass(frozen=True, slots=True)
class ShortcutReport:
    """What the model's skill rests on."""

    skill: float
    """On whole pictures, corrected for chance."""
    survives: Share | None
    """Skill that is left in a chimera; None if the model has no skill to explain."""
    cues: tuple[CueReport, ...]
    few: bool = False
    """Whether pictures are fewer than the grid's cells: then some patches of a chimera come from
    one picture, and show parts of its scene together."""

    @property
    def found(self) -> tuple[CueReport, ...]:
        """The shortcuts, the heaviest first."""
        shortcuts = [cue for cue in self.cues if cue.is_shortcut]
        return tuple(sorted(shortcuts, key=lambda cue: -cue.weight))

    @property
    def verdict(self) -> str:
        """Tell in a sentence whether the task is solved by content."""
        if self.few and self.survives is not None:
            return f"{self._judgement}. Pictures are too few to take every scene apart: give more"
        return self._judgement

    @property
    def _judgement(self) -> str:
        there = " and ".join(cue.name for cue in self.cues if cue.is_there)
        if self.survives is None:
            have = f", though the pictures have {there}" if there else ""
            return f"the model places nothing yet, so takes no shortcut{have}"
        if self.found:
            names = " and ".join(cue.name for cue in self.found)
            return (
                f"shortcut: {names}; {self.survives} of the skill survives without a scene. "
                "Crop, mask or re-encode the pictures so that it goes, and train again"
            )
        if self.survives.low > UNEXPLAINED:
            return (
                f"no known shortcut, but {self.survives} of the skill survives without a scene: "
                "layout (sky above, ground below, a subject in the middle), or a cue that is not "
                "looked for"
            )
        kept = f"{self.survives} of the skill survives without a scene"
        if self.survives.high > UNDECIDED:
            return f"not decided: {kept}. Give more pictures, or train for longer"
        return f"no shortcut: {kept}" + (f"; {there}: there, not used" if there else "")

    def metrics(self) -> dict[str, float]:
        """Name the figures for a ledger."""
        figures = {"shortcuts/skill": self.skill, "shortcuts/found": float(len(self.found))}
        if self.survives is not None:
            figures["shortcuts/survives"] = self.survives.value
        for cue in self.cues:
            figures[f"shortcuts/{cue.cue}/times_chance"] = cue.probe.times_chance
            for name, share in (("carried", cue.carried), ("missed", cue.missed)):
                if share is not None:
                    figures[f"shortcuts/{cue.cue}/{name}"] = share.value
        return figures


def measure_shortcuts(
    predict: Predict,
    pictures: UInt8[Tensor, "P rows columns 3"],
    grid: Grid,
    counts: Counts,
    *,
    seed: int = 0,
    batch: int = 64,
) -> ShortcutReport:
    """Find out whether a model places patches by cues of the frame.

    Twelve passes over the pictures, and the probes. Same pictures, model and seed, same report.

    Args:
        predict: The model's answers: see `droppos.measure.position.position_predictor`.
        pictures: Pictures it was not trained on, of its size, with their outermost pixels, for
            that is where borders are; some hundred of them.
        grid: Rows and columns of the patch grid.
        counts: Patches of a picture by part: the protocol's.
        seed: Of masks, chimera, shifts and resamples.
        batch: Pictures at a time; changes nothing but memory and time.

    Raises:
        ConfigError: If the grid is too small to have an inside.
        DataError: If there are too few pictures.
    """
    if min(grid) < SMALLEST_GRID:
        raise ConfigError(
            f"a grid of {grid.rows} x {grid.columns} patches is too small to tell a frame from a "
            f"scene; it takes {SMALLEST_GRID} x {SMALLEST_GRID}: use a smaller model.patch_size"
        )
    probes = probe_cues(pictures, grid)

    def hits(edited: Tensor) -> Float[np.ndarray, " P"]:
        return _hits(predict, edited, counts, seed, batch)

    whole, mixed = hits(pictures), hits(chimera(pictures, grid, seed))
    edits = _edits(seed)
    without = {cue: edits[cue](pictures) for cue in CUES}
    missed = [whole - hits(without[cue]) for cue in CUES]
    carried = [mixed - hits(chimera(without[cue], grid, seed)) for cue in CUES]

    blind = counts.scored * counts.chance
    shares = _shares([mixed - blind, *carried, *missed], whole - blind, seed)
    few = len(pictures) < grid.cells
    skill = (float(whole.mean()) - blind) / (counts.scored - blind)
    if shares is None:
        nothing = tuple(CueReport(cue, probes[cue], None, None) for cue in CUES)
        return ShortcutReport(skill, None, nothing, few)
    survives, rest = shares[0], shares[1:]
    parts = zip(CUES, rest[: len(CUES)], rest[len(CUES) :], strict=True)
    reports = tuple(CueReport(cue, probes[cue], carry, miss) for cue, carry, miss in parts)
    return ShortcutReport(skill, survives, reports, few)


def _edits(seed: int) -> dict[Cue, Callable[[Tensor], Tensor]]:
    """Name what takes each cue out of a set of pictures."""
    return {
        "borders": crop_borders,
        "marks": flatten_marks,
        "fall_off": flatten_fall_off,
        "fringes": grey,
        "grid": lambda pictures: shift_grid(pictures, seed),
    }


@torch.no_grad()
def _hits(
    predict: Predict, pictures: Tensor, counts: Counts, seed: int, batch: int
) -> Float[np.ndarray, " P"]:
    """Count the patches of each picture that are put into exactly their cell."""
    found = []
    for first in range(0, len(pictures), batch):
        part = pictures[first : first + batch]
        draw = protocol_draw(counts, range(first, first + len(part)), seed)
        logits = predict(part, draw).cpu()
        found.append((logits.argmax(dim=2) == draw.asked).sum(dim=1))
    return torch.cat(found).double().numpy()


def _shares(
    parts: Sequence[Float[np.ndarray, " P"]], whole: Float[np.ndarray, " P"], seed: int
) -> list[Share] | None:
    """Divide sums over pictures by the whole's, with intervals by the bootstrap over pictures.

    Returns:
        None if the whole may be nothing: a share of it would mean nothing.
    """
    pictures = len(whole)
    weights = np.random.default_rng(seed).multinomial(
        pictures, np.full(pictures, 1 / pictures), size=RESAMPLES
    )
    resampled: Float[np.ndarray, " R"] = weights @ whole
    if np.quantile(resampled, 0.025) <= 0:
        return None
    shares = []
    for part in parts:
        low, high = np.quantile((weights @ part) / resampled, [0.025, 0.975])
        shares.append(Share(float(part.sum() / whole.sum()), float(low), float(high)))
    return shares
