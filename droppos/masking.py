"""Masking: which patches the encoder sees, and which of those keep their position.

Both choices come from uniform noise that the caller draws, so they are reproducible from
any generator and equal for a picture wherever it is trained (paper section 3.1).

Axes in this file
    B  images on this rank
    G  images of the global batch
    N  cells in the patch grid (rows * columns)
    V  visible patches of an image
    K  visible patches that keep their position; S = V - K do not, and are scored
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from droppos.config import Counts, Method


class Draw(NamedTuple):
    """The masks of a batch of images."""

    visible: Int[Tensor, "B V"]
    """Cells of the visible patches, in the order in which they enter the encoder."""
    scored: Int[Tensor, "B S"]
    """Which of the visible patches lost their position, by index into ``visible``, ascending."""
    hidden: Int[Tensor, "B H"]
    """Cells of the N - V patches the encoder never sees; the pixel task asks for them."""
    wrong: Int[Tensor, "B V"] | None = None
    """Cell whose position a dropped patch is given instead of its own (dropped_token wrong)."""

    @property
    def dropped(self) -> Bool[Tensor, "B V"]:
        """Whether each visible patch lost its position."""
        none = torch.zeros_like(self.visible, dtype=torch.bool)
        return none.scatter(1, self.scored, True)

    @property
    def asked(self) -> Int[Tensor, "B S"]:
        """True cells of the scored patches."""
        return self.visible.gather(1, self.scored)

    def to(self, device: torch.device) -> "Draw":
        """Copy it to a device."""
        wrong = None if self.wrong is None else self.wrong.to(device)
        return Draw(self.visible.to(device), self.scored.to(device), self.hidden.to(device), wrong)


class Noise(NamedTuple):
    """Uniform draws in [0, 1) from which a :class:`Draw` follows."""

    patches: Float[Tensor, "B N"]
    positions: Float[Tensor, "B V"]
    order: Float[Tensor, "B V"] | None = None
    """For one more random order of the visible patches (method.shuffle)."""
    wrong: Float[Tensor, "B N"] | None = None
    """For the wrong positions of dropped patches (method.dropped_token)."""

    def of(self, slots: Int[Tensor, "B"]) -> "Noise":
        """Take the rows of some images of the batch."""
        return Noise(
            self.patches[slots],
            self.positions[slots],
            None if self.order is None else self.order[slots],
            None if self.wrong is None else self.wrong[slots],
        )


def draw_patches(
    counts: Counts, noise_patches: Float[Tensor, "B N"], noise_positions: Float[Tensor, "B V"]
) -> Draw:
    """Choose visible patches and dropped positions by the rank of their noise.

    The V cells of smallest noise are visible, in ascending order of noise; the K of those with
    the smallest second noise keep their position.
    """
    cells = noise_patches.argsort(dim=1)
    scored = noise_positions.argsort(dim=1)[:, counts.kept :].sort(dim=1).values
    return Draw(cells[:, : counts.visible], scored, cells[:, counts.visible :])


def draw_noise(counts: Counts, method: Method, generator: torch.Generator, images: int) -> Noise:
    """Draw the noise of a whole global batch, on the generator's device.

    Every rank draws the same rows and takes those of its own images (:meth:`Noise.of`), so an
    image has the same masks however many workers share the batch. At 4,096 images and 196
    cells that is a million numbers, nothing beside a step.
    """

    def uniform(columns: int) -> Float[Tensor, "G columns"]:
        return torch.rand(images, columns, generator=generator, device=generator.device)

    return Noise(
        patches=uniform(counts.cells),
        positions=uniform(counts.visible),
        order=uniform(counts.visible) if method.shuffle else None,
        wrong=uniform(counts.cells) if method.dropped_token == "wrong" else None,
    )


def draw(counts: Counts, method: Method, noise: Noise) -> Draw:
    """Make the masks of a batch, with the method's options."""
    masks = draw_patches(counts, noise.patches, noise.positions)
    if noise.order is not None:
        order = noise.order.argsort(dim=1)
        moved = order.argsort(dim=1).gather(1, masks.scored).sort(dim=1).values
        masks = masks._replace(visible=masks.visible.gather(1, order), scored=moved)
    if noise.wrong is not None:
        permutation = noise.wrong.argsort(dim=1)
        if method.conformance != "paper":
            permutation = permutation[:1].expand_as(permutation)  # one for the whole batch
        masks = masks._replace(wrong=permutation.gather(1, masks.visible))
    return masks
