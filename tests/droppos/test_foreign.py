"""Other projects' weights: those that fit compute the same, and those that don't are named."""

import argparse
from io import BytesIO
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save

from droppos.config import Heads, Model
from droppos.encoder import sincos_positions
from droppos.errors import ConfigError, DataError
from droppos.foreign import our_names, read_weights, standard_heads, understand
from droppos.masking import draw_patches
from tests.droppos.test_parity import CASES, GOLDEN, MODEL, reference_weights

HEADS = Heads(encoder=4, decoder=4)


def saved(content: Any) -> bytes:
    file = BytesIO()
    torch.save(content, file)
    return file.getvalue()


def official() -> dict[str, Any]:
    """A checkpoint as the reference's training script leaves it."""
    weights = {name: value.float() for name, value in reference_weights().items()}
    args = argparse.Namespace(model="mae_vit", lr=1e-3)
    return {"model": weights, "optimizer": {"state": {}}, "epoch": 799, "args": args}


def plain_timm(**arguments: Any) -> torch.nn.Module:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **(small | arguments)).eval()


def test_the_reference_checkpoint_gives_the_reference_s_logits() -> None:
    weights = read_weights("droppos.pth", saved(official()))
    trained = understand("droppos.pth", weights, HEADS)
    assert trained.droppos is not None
    assert (trained.model.grid, trained.model.shape) == (MODEL.grid, MODEL.shape)
    assert trained.whole.method.objective == "position_pixels"
    counts = CASES["plain"].counts(MODEL.grid)
    noise = (torch.from_numpy(GOLDEN[f"noise_{kind}"]) for kind in ("patches", "positions"))
    draw = draw_patches(counts, *noise)
    with torch.no_grad():
        logits = trained.droppos(torch.from_numpy(GOLDEN["images"]).float(), draw).logits
    assert logits is not None
    scored = draw.scored[..., None].expand_as(logits)
    expected = torch.from_numpy(GOLDEN["plain/logits"]).gather(1, scored)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)


def test_the_positions_that_are_left_out_are_those_we_compute() -> None:
    _, left = our_names(reference_weights())
    assert left == ["aux_decoder_pos_embed"]
    ours = sincos_positions(MODEL.grid, MODEL.decoder_width).double()
    theirs = reference_weights()["aux_decoder_pos_embed"]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_it_does_not_matter_how_a_state_dict_is_wrapped() -> None:
    bare = {name: value.float() for name, value in reference_weights().items()}
    for content in (
        bare,
        {"model": bare},
        {"state_dict": bare, "epoch": 3},
        {"model": {f"module.{name}": value for name, value in bare.items()}},
    ):
        found = read_weights("file.pt", saved(content))
        assert found.keys() == bare.keys()
        assert all(torch.equal(found[name], value) for name, value in bare.items())
    assert read_weights("file.safetensors", save(bare)).keys() == bare.keys()


def test_half_precision_is_read_as_float32() -> None:
    found = read_weights("file.safetensors", save({"norm.bias": torch.ones(2).bfloat16()}))
    assert found["norm.bias"].dtype == torch.float32


def test_a_reference_without_pixel_task_has_a_position_head_only() -> None:
    weights = {name: v.float() for name, v in reference_weights().items() if "aux_" not in name}
    assert "mask_token" in weights  # some of its files keep the token of the task they lack
    trained = understand("droppos.pth", weights, HEADS)
    assert trained.whole.method.objective == "position"
    assert trained.whole.pixel_decoder is None


def test_mae_s_decoder_is_the_pixel_decoder() -> None:
    weights: dict[str, torch.Tensor] = {}
    for name, value in reference_weights().items():
        if name.startswith("aux_"):
            weights[name.removeprefix("aux_")] = value.float()
        elif not name.startswith(("decoder_", "mask_pos")):
            weights[name] = value.float()
    trained = understand("mae_pretrain_full.pth", weights, HEADS)
    assert trained.droppos is None and trained.whole.pixel_decoder is not None
    head = trained.whole.pixel_decoder.head.weight
    assert torch.equal(head, weights["decoder_pred.weight"])
    encoder = {name: value for name, value in weights.items() if not name.startswith("decoder_")}
    alone = understand("mae_pretrain.pth", encoder, HEADS)  # with mask_token, without decoder
    assert alone.task is None and alone.model.grid == (6, 6)


@pytest.mark.parametrize("classes", [0, 7])
def test_a_timm_backbone_computes_the_same_with_its_learnt_positions(classes: int) -> None:
    model: Any = plain_timm(num_classes=classes)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    trained = understand("vit.pth", model.state_dict(), Heads(encoder=3))
    assert trained.task is None
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = trained.encoder.forward_features(pictures)
        torch.testing.assert_close(found, model.forward_features(pictures), atol=1e-6, rtol=0)


def test_heads_of_a_standard_size_are_known() -> None:
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).state_dict()
    trained = understand("vit.pth", weights, Heads())
    assert trained.model == Model(size="tiny", image_size=(32, 32))
    assert [standard_heads(*s) for s in ((384, 12), (768, 12), (1024, 24))] == [6, 12, 16]


def test_other_heads_must_be_told() -> None:
    weights = {name: value.float() for name, value in reference_weights().items()}
    with pytest.raises(ConfigError, match=r"2 blocks of 48 channels.*--heads\.encoder"):
        understand("file.pth", weights, Heads())
    with pytest.raises(ConfigError, match=r"decoder of 32 channels.*--heads\.decoder"):
        understand("file.pth", weights, Heads(encoder=4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reg_tokens": 2}, r"register tokens \(encoder\.reg_token\)"),
        ({"init_values": 0.1}, "layer scale"),
        ({"qk_norm": True}, "normalised queries and keys"),
        ({"global_pool": "avg"}, "a norm after pooling"),
        ({"pre_norm": True}, "a norm before the blocks"),
        ({"mlp_layer": timm.layers.SwiGLU}, "SwiGLU"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "class token"),
        ({"no_embed_class": True}, "position for the class token"),
        ({"qkv_bias": False}, r"2 missing \(encoder\.blocks\.0\.attn\.qkv\.bias"),
        ({"mlp_ratio": 2}, r"of another shape \(encoder\.blocks\.0\.mlp\.fc1\.weight"),
    ],
)
def test_another_kind_of_transformer_is_refused_by_name(
    arguments: dict[str, Any], words: str
) -> None:
    weights = plain_timm(num_classes=0, **arguments).state_dict()
    with pytest.raises(ConfigError, match=words):
        understand("vit.pth", weights, Heads(encoder=3))


def test_what_is_missing_or_left_over_is_counted_and_named() -> None:
    weights = dict(plain_timm(num_classes=0).state_dict())
    del weights["blocks.0.norm1.weight"], weights["norm.bias"]
    weights["extra.scale"] = torch.ones(1)
    with pytest.raises(
        ConfigError,
        match=r"2 missing \(encoder\.blocks\.0\.norm1\.weight, encoder\.norm\.bias\); "
        r"1 unknown \(encoder\.extra\.scale\)",
    ):
        understand("vit.pth", weights, Heads(encoder=3))


class Harmful:
    """What a pickle must not be able to do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("harm",))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("file.pth", b"torn", "cannot be read as weights"),
        ("file.safetensors", b"torn", "cannot be read as weights"),
        ("file.pth", saved({"model": Harmful()}), "cannot be read as weights"),
        ("file.pth", saved({"epoch": 3, "loss": 1.0}), "holds keys epoch, loss"),
        ("file.pth", saved([1, 2]), "holds list"),
        ("file.pth", saved({0: torch.ones(1)}), "holds keys 0"),
        ("file.pth", saved({"model": {}}), "holds nothing"),
    ],
)
def test_what_is_no_file_of_weights_says_so(
    capsys: pytest.CaptureFixture[str], name: str, data: bytes, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        read_weights(name, data)
    assert "harm" not in capsys.readouterr().out
