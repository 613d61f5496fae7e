"""The location probe: what is read where there is something to read, and where there is nothing."""

import pytest
import torch

from droppos.encoder import build_encoder, sincos_positions
from droppos.measure.location import location_probe, pixel_location_probe, unplaced_tokens
from tests.droppos.tiny import TINY

HEIGHT, WIDTH = TINY.image_size


@pytest.fixture
def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_encoder(TINY).eval()


def noise(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator)


def ramp(count: int, seed: int) -> torch.Tensor:
    """Red tells the column and green the row; blue is noise."""
    pictures = noise(count, seed)
    pictures[..., 0] = torch.linspace(0, 255, WIDTH).byte()
    pictures[..., 1] = torch.linspace(0, 255, HEIGHT).byte()[:, None]
    return pictures


def test_a_place_that_shows_is_read(encoder) -> None:
    found = location_probe(encoder, ramp(60, 0), ramp(30, 1))
    assert found.accuracy.value > 0.7  # by chance 1 of 24


def test_a_place_that_does_not_show_is_not_read(encoder) -> None:
    found = location_probe(encoder, noise(60, 0), noise(30, 1))
    chance = 1 / TINY.grid.cells
    assert found.accuracy.value < 2 * chance


def test_positions_of_the_encoder_have_no_part_in_it(encoder) -> None:
    before, cells = unplaced_tokens(encoder, noise(3, 0))
    encoder.pos_embed.data[:, 1:] = 7 * sincos_positions(TINY.grid, TINY.shape.width)[:, 1:]
    after, _ = unplaced_tokens(encoder, noise(3, 0))
    assert torch.equal(before, after)
    assert cells.tolist() == list(range(TINY.grid.cells)) * 3


def test_the_stand_in_takes_the_positions_place(encoder) -> None:
    shift = torch.ones(1, 1, TINY.shape.width)
    assert not torch.equal(
        unplaced_tokens(encoder, noise(3, 0))[0], unplaced_tokens(encoder, noise(3, 0), shift)[0]
    )


def test_pixels_alone_are_the_control() -> None:
    """The mean red and green of a patch are its place; no encoder is needed to see that."""
    assert pixel_location_probe(ramp(60, 0), ramp(30, 1), 8).accuracy.value > 0.7
    chance = 1 / TINY.grid.cells
    assert pixel_location_probe(noise(60, 0), noise(30, 1), 8).accuracy.value < 2 * chance


def test_a_batch_changes_nothing(encoder) -> None:
    whole = unplaced_tokens(encoder, noise(5, 0))[0]
    torch.testing.assert_close(whole, unplaced_tokens(encoder, noise(5, 0), batch=2)[0])
