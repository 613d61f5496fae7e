"""The golden values of the reference implementation, in float64 (tests/data/droppos_tiny.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from droppos.config import Grid, Method, Model, Optim
from droppos.encoder import encode
from droppos.foreign import our_name, our_names
from droppos.loss import Metrics, pretraining_loss
from droppos.masking import Draw, draw_patches
from droppos.model import DropPos, Prediction
from droppos.schedule import learning_rate
from droppos.targets import attentive_weights, smoothed_targets

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "droppos_tiny.npz")
MODEL = Model(
    size="tiny",
    image_size=(96, 96),
    width=48,
    depth=2,
    heads=4,
    decoder_width=32,
    decoder_depth=2,
    decoder_heads=4,
)
CASES = {
    "plain": Method(conformance="reference", sigma=0, attentive=False),
    "smooth": Method(conformance="reference", sigma=1, attentive=False),
    "attentive": Method(conformance="reference", sigma=1),
    "half_sigma_attentive": Method(conformance="reference", sigma=0.5),
    "zeros_token": Method(conformance="reference", sigma=1, attentive=False, dropped_token="zeros"),
    "multi_task": Method(conformance="reference", sigma=1, objective="position_pixels"),
}
RELATIVE = 1e-5


def reference_weights() -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("weight/"): torch.from_numpy(GOLDEN[name]).double()
        for name in GOLDEN.files
        if name.startswith("weight/")
    }


def golden_model(method: Method) -> DropPos:
    model = DropPos(MODEL, method).double()
    ours = set(model.state_dict())
    weights, _ = our_names(reference_weights())
    weights = {name: value for name, value in weights.items() if name in ours}
    if method.dropped_token == "zeros":
        weights["dropped_token"] = torch.zeros_like(weights["dropped_token"])
    model.load_state_dict(weights)
    if model.pixel_decoder is not None:
        model.pixel_decoder.positions = torch.from_numpy(
            GOLDEN["weight/aux_decoder_pos_embed"]
        ).double()
    return model


def run(case: str) -> tuple[DropPos, Draw, Prediction, Metrics]:
    method = CASES[case]
    model = golden_model(method)
    images = torch.from_numpy(GOLDEN["images"]).double()
    draw = draw_patches(
        method.counts(MODEL.grid),
        torch.from_numpy(GOLDEN["noise_patches"]),
        torch.from_numpy(GOLDEN["noise_positions"]),
    )
    prediction = model(images, draw, guided=method.attentive)
    targets = smoothed_targets(MODEL.grid, method.sigma, method.conformance)
    metrics = pretraining_loss(method, prediction, draw, targets, images, patch_size=16)
    return model, draw, prediction, metrics


@torch.no_grad()
def logits_of_all(model: DropPos, draw: Draw) -> torch.Tensor:
    """Also of patches that kept their position, which the reference computes and no one reads."""
    assert model.position_decoder is not None
    patches = model.encoder.patch_embed(torch.from_numpy(GOLDEN["images"]).double())
    tokens = encode(model.encoder, model._visible_tokens(patches, draw))
    return model.position_decoder(
        tokens, torch.arange(draw.visible.shape[1]).expand_as(draw.visible)
    )


def assert_close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    expected = torch.from_numpy(np.asarray(theirs)).to(ours.dtype)
    torch.testing.assert_close(ours, expected, rtol=RELATIVE, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_case_is_the_reference(case: str) -> None:
    model, draw, prediction, metrics = run(case)

    assert (draw.visible.numpy() == GOLDEN[f"{case}/ids_keep"]).all()
    assert (draw.dropped.numpy() == GOLDEN[f"{case}/position_dropped"].astype(bool)).all()
    assert prediction.logits is not None
    scored = draw.scored[..., None].expand_as(prediction.logits)
    assert_close(
        prediction.logits.detach(),
        np.take_along_axis(GOLDEN[f"{case}/logits"], scored.numpy(), axis=1),
    )
    assert_close(logits_of_all(model, draw), GOLDEN[f"{case}/logits"])
    assert_close(metrics.loss.detach(), GOLDEN[f"{case}/loss"])
    assert_close(metrics.position_loss.detach(), GOLDEN[f"{case}/loss_position"])
    assert_close(metrics.position_accuracy, GOLDEN[f"{case}/accuracy_as_weighted"])
    if f"{case}/loss_pixels" in GOLDEN:
        assert_close(metrics.pixel_loss.detach(), GOLDEN[f"{case}/loss_pixels"])
    if f"{case}/attentive_weight" in GOLDEN:
        assert prediction.similarity is not None
        everything = torch.ones_like(draw.dropped)
        weights = attentive_weights(prediction.similarity.double(), everything, tau=0.1)
        assert_close(weights, GOLDEN[f"{case}/attentive_weight"])

    metrics.loss.backward()
    norms = {
        our_name(name.split("grad_norm/")[1], reference_weights()): GOLDEN[name]
        for name in GOLDEN.files
        if name.startswith(f"{case}/grad_norm/")
    }
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert_close(gradients[name].norm(), norm)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 2.0])
def test_smoothing_map_is_the_reference(sigma: float) -> None:
    ours = smoothed_targets(Grid(6, 6), sigma, "reference")
    expected = torch.from_numpy(GOLDEN[f"smoothing_official/{sigma}"])
    torch.testing.assert_close(ours, expected, rtol=RELATIVE, atol=1e-7)


def test_learning_rate_is_the_reference() -> None:
    optim = Optim(epochs=800, warmup_epochs=10, global_batch=1024, lr_per_256=1.5e-4)
    for epoch, expected in zip(GOLDEN["schedule/epoch"], GOLDEN["schedule/lr"], strict=True):
        assert learning_rate(optim, epoch) == pytest.approx(expected, rel=RELATIVE)
