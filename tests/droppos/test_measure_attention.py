import pytest
import torch

from droppos.config import Method
from droppos.measure.attention import attention, class_attention
from droppos.model import DropPos, normalise
from tests.droppos.tiny import TINY


@pytest.fixture
def droppos() -> DropPos:
    torch.manual_seed(0)
    return DropPos(TINY, Method()).eval()


def test_values_mixed_by_the_attention_are_what_the_layer_gives(droppos: DropPos) -> None:
    layer = droppos.encoder.blocks[-1].attn
    tokens = torch.randn(2, 25, TINY.shape.width)
    values = layer.qkv(tokens).unflatten(-1, (3, 4, 12))[:, :, 2].transpose(1, 2)
    mixed = (attention(layer, tokens) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.proj(mixed), layer(tokens))


def test_a_look_is_a_distribution_over_class_token_and_patches(droppos: DropPos) -> None:
    pictures = torch.randint(256, (3, 32, 48, 3), dtype=torch.uint8)
    looks = class_attention(droppos.encoder, pictures)
    assert looks.shape == (3, 4, 25)
    torch.testing.assert_close(looks.sum(-1), torch.ones(3, 4))
    assert looks.std() > 0


def test_without_queries_the_look_is_even(droppos: DropPos) -> None:
    layer = droppos.encoder.blocks[-1].attn
    with torch.no_grad():
        layer.qkv.weight[: TINY.shape.width] = 0
        layer.qkv.bias[: TINY.shape.width] = 0
    pictures = torch.randint(256, (1, 32, 48, 3), dtype=torch.uint8)
    looks = class_attention(droppos.encoder, pictures)
    torch.testing.assert_close(looks, torch.full((1, 4, 25), 1 / 25))


def test_looking_leaves_the_encoder_as_it_was(droppos: DropPos) -> None:
    pictures = torch.randint(256, (2, 32, 48, 3), dtype=torch.uint8)
    before = droppos.encode_whole(normalise(pictures))
    class_attention(droppos.encoder, pictures)
    torch.testing.assert_close(droppos.encode_whole(normalise(pictures)), before)
    assert not droppos.encoder.blocks[-1]._forward_pre_hooks
