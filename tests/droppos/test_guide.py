"""The guide computes less than a second pass would, and says the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from droppos.config import Grid, Method
from droppos.encoder import encode
from droppos.errors import ConfigError
from droppos.guide import cosine, halved_cells
from droppos.loss import pretraining_loss
from droppos.masking import Draw, draw, draw_noise
from droppos.model import DropPos
from droppos.targets import smoothed_targets
from tests.droppos.tiny import TINY

DEEPER = replace(TINY, depth=3)
METHOD = Method(mask_ratio=0.5)


def model(**method: Any) -> DropPos:
    torch.manual_seed(0)
    return DropPos(DEEPER, replace(METHOD, **method))


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


def test_with_every_patch_visible_the_visible_ones_are_the_picture() -> None:
    cells = torch.arange(24).expand(3, -1)
    everything = Draw(cells, cells[:, :18], cells[:, :0])
    found = [
        model(guide=guide)(images(), everything, guided=True).similarity
        for guide in ("picture", "visible")
    ]
    torch.testing.assert_close(found[0], found[1])


def test_with_no_position_dropped_the_student_is_the_visible_patches_guide() -> None:
    kept = masks()._replace(scored=torch.zeros(3, 0, dtype=torch.long))
    found = [
        model(guide=guide)(images(), kept, guided=True).similarity
        for guide in ("student", "visible")
    ]
    torch.testing.assert_close(found[0], found[1])
    assert not found[0].requires_grad
    dropped = model(guide="student")(images(), masks(), guided=True).similarity
    assert not torch.allclose(dropped, found[0], atol=1e-3)


def test_a_guide_of_all_blocks_is_the_whole_one_and_one_of_fewer_is_not() -> None:
    whole = model()(images(), masks(), guided=True).similarity
    all_three = model(guide_depth=3)(images(), masks(), guided=True).similarity
    assert torch.equal(all_three, whole)
    ours = model(guide_depth=2)
    shallow = ours(images(), masks(), guided=True).similarity
    assert not torch.allclose(shallow, whole, atol=1e-3)
    del ours.encoder.blocks[2]
    fewer = replace(METHOD, guide_depth=None)
    ours.method = fewer
    torch.testing.assert_close(shallow, ours(images(), masks(), guided=True).similarity)


def test_half_a_picture_is_the_guide_of_one_enlarged_from_it() -> None:
    """A picture of even blocks of 2 x 2 pixels loses nothing when halved."""
    ours, drawn = model(guide="half"), masks()
    small = torch.randn(3, 3, 16, 24)
    enlarged = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    found = ours(enlarged, drawn, guided=True).similarity
    patches = ours.encoder.patch_embed.proj(small).flatten(2).transpose(1, 2)
    cells = ours.encoder.pos_embed[0, 1:].view(2, 2, 3, 2, 48).mean(dim=(1, 3)).view(6, 48)
    expected = cosine(encode(ours.encoder, patches + cells))
    parents = halved_cells(DEEPER.grid, drawn.visible)
    torch.testing.assert_close(found, expected.gather(1, parents))


def test_four_cells_share_one_of_the_halved_picture() -> None:
    cells = torch.arange(24).view(1, -1)
    assert halved_cells(Grid(4, 6), cells).view(4, 6).tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 1, 1, 2, 2],
        [3, 3, 4, 4, 5, 5],
        [3, 3, 4, 4, 5, 5],
    ]


def test_a_guide_that_cannot_be_is_refused() -> None:
    odd = replace(DEEPER, image_size=(40, 48))
    with pytest.raises(ConfigError, match=r"method\.guide.*5 x 6.*even"):
        DropPos(odd, replace(METHOD, guide="half"))
    with pytest.raises(ConfigError, match=r"method\.guide_depth.*at most.*3 blocks, got 4"):
        DropPos(DEEPER, replace(METHOD, guide_depth=4))
    with pytest.raises(ConfigError, match=r"method\.guide_depth.*positive, got 0"):
        Method(guide_depth=0)
    with pytest.raises(ConfigError, match=r"method\.guide_depth.*student"):
        Method(guide="student", guide_depth=2)
