"""What a run takes of another model, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

from droppos.beginning import FirstWeights, first_weights
from droppos.config import Heads, Method, Model
from droppos.encoder import positions, resample_positions
from droppos.errors import ConfigError
from droppos.foreign import understand
from droppos.model import DropPos
from droppos.trained import Trained
from tests.droppos.tiny import TINY

BOTH = Method(objective="position_pixels")


def trained(model: Model = TINY, method: Method = BOTH) -> Trained:
    droppos = DropPos(model, method).eval()
    return Trained(droppos.encoder, model, droppos)


def taken(first: FirstWeights) -> set[str]:
    return {name.partition(".")[0] for name in first.weights}


def test_the_same_model_is_taken_whole() -> None:
    source = trained()
    first = first_weights("it", source, TINY, BOTH)
    expected = source.whole.state_dict()
    assert first.weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in first.weights.items())
    assert first.notice == "the encoder is taken whole"


def test_what_is_taken_is_a_copy() -> None:
    source = trained()
    first = first_weights("it", source, TINY, BOTH)
    with torch.no_grad():
        source.encoder.norm.weight.add_(1)
    assert (first.weights["encoder.norm.weight"] == 1).all()


@pytest.mark.parametrize(
    ("source", "model", "method", "parts", "words"),
    [
        (trained(), TINY, Method(), {"position_decoder", "dropped_token"}, "used: pixel_decoder"),
        (trained(method=Method(objective="pixels")), TINY, BOTH, {"pixel_decoder"}, "new: dropped"),
        (trained(), replace(TINY, decoder_depth=1), BOTH, {"dropped_token"}, "new: pixel_decoder"),
        (trained(), replace(TINY, decoder_heads=2), BOTH, {"dropped_token"}, "new: pixel_decoder"),
        (trained(), TINY, replace(BOTH, dropped_token="zeros"), {"position_decoder",
          "pixel_decoder"}, "new: dropped_token"),
        (
            trained(),
            replace(TINY, image_size=(48, 32)),  # as many cells, elsewhere
            BOTH,
            {"pixel_decoder", "dropped_token"},
            "resampled from 4 x 6 to 6 x 4",
        ),
    ],
)  # fmt: skip
def test_a_decoder_is_taken_only_if_it_is_the_same(
    source: Trained, model: Model, method: Method, parts: set[str], words: str
) -> None:
    first = first_weights("it", source, model, method)
    assert taken(first) == {"encoder", *parts}
    assert words in first.notice
    missing = DropPos(model, method).load_state_dict(first.weights, strict=False)
    assert not missing.unexpected_keys
    assert not [name for name in missing.missing_keys if name.partition(".")[0] in taken(first)]


def test_learnt_positions_come_along_resampled_and_stay_fixed() -> None:
    backbone: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=4
    )
    source = understand("vit.pth", backbone.state_dict(), Heads(encoder=4))
    first = first_weights("vit.pth", source, TINY, BOTH)
    assert taken(first) == {"encoder"}
    expected = resample_positions(backbone.pos_embed.detach(), source.model.grid, TINY.grid)
    assert torch.equal(first.weights["encoder.pos_embed"], expected)
    for words in (
        "positions are not computed ones; they stay fixed",
        "from 6 x 6 to 4 x 6",
        "new: dropped_token, pix",
    ):
        assert words in first.notice
    droppos = DropPos(TINY, BOTH)
    droppos.load_state_dict(first.weights, strict=False)
    assert torch.equal(positions(droppos.encoder), expected)
    assert not positions(droppos.encoder).requires_grad


def test_another_encoder_is_refused_with_each_difference() -> None:
    other = replace(TINY, width=24, heads=3, depth=3)
    with pytest.raises(
        ConfigError, match=r"width 48 there, 24 in the recipe, depth 2 there, 3.*heads 4 there, 3"
    ):
        first_weights("it", trained(), other, BOTH)
