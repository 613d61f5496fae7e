"""The guide computes less than a second pass would, and says the same."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from droppos.config import Method
from droppos.loss import pretraining_loss
from droppos.masking import Draw, draw, draw_noise
from droppos.model import DropPos
from droppos.targets import smoothed_targets
from tests.droppos.tiny import TINY

DEEPER = replace(TINY, depth=3)
METHOD = Method(mask_ratio=0.5)


def model() -> DropPos:
    torch.manual_seed(0)
    return DropPos(DEEPER, METHOD)


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def masks() -> Draw:
    counts = METHOD.counts(DEEPER.grid)
    noise = draw_noise(counts, METHOD, torch.Generator().manual_seed(0), 3)
    return draw(counts, METHOD, noise)


def gradients(model: DropPos, *, guided: bool, half: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        logits = model(images(), masks(), guided=guided).logits
    logits.float().square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_it_is_the_whole_second_pass() -> None:
    ours, drawn = model().double(), masks()
    found = ours(images().double(), drawn, guided=True).similarity
    tokens = ours.encoder.forward_features(images().double())
    everywhere = F.cosine_similarity(tokens[:, 1:], tokens[:, :1], dim=-1)
    torch.testing.assert_close(found, everywhere.gather(1, drawn.visible))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("guide", [None, torch.bfloat16])
def test_it_leaves_every_gradient_as_it_is(half: bool, guide: torch.dtype | None) -> None:
    """Where torch keeps weights that autocast has cast, the guide's would lead to no gradient."""
    ours = model()
    ours.guide_dtype = guide
    without = gradients(ours, guided=False, half=half)
    guided = gradients(ours, guided=True, half=half)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert without.keys() == guided.keys() == trained
    for name, gradient in without.items():
        assert gradient.any(), name
        assert torch.equal(guided[name], gradient), name


def test_half_precision_moves_the_loss_by_parts_in_ten_thousand() -> None:
    losses, drawn = [], masks()
    for dtype in (None, torch.bfloat16):
        ours = model()
        ours.guide_dtype = dtype
        prediction = ours(images(), drawn, guided=True)
        targets = smoothed_targets(DEEPER.grid, 1)
        losses.append(pretraining_loss(METHOD, prediction, drawn, targets, images(), 8).loss.item())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=5e-4)
