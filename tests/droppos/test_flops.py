import time
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from droppos.config import Compute, Method, Model, Optim
from droppos.flops import matmul_peak, step_flops
from droppos.step import MicroBatch, TrainState, train_step
from tests.droppos.tiny import TINY

MODEL = replace(TINY, depth=3)


@pytest.mark.parametrize("objective", ["position", "position_pixels", "pixels"])
@pytest.mark.parametrize("attentive", [False, True])
def test_the_formula_is_what_torch_counts(objective: str, attentive: bool) -> None:
    check(Method(objective=objective, attentive=attentive, mask_ratio=0.5))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("depth", [None, 1, 3])
@pytest.mark.parametrize("guide", ["picture", "half", "visible"])
def test_the_formula_is_what_torch_counts_of_a_guide(guide: str, depth: int | None) -> None:
    check(Method(mask_ratio=0.5, guide=guide, guide_depth=depth))  # pyright: ignore[reportArgumentType]


def test_the_students_own_features_are_free() -> None:
    check(Method(mask_ratio=0.5, guide="student"))
    free, none = Method(guide="student"), Method(attentive=False)
    assert step_flops(MODEL, free) == step_flops(MODEL, none)


def check(method: Method) -> None:
    images = 3
    state = TrainState.create(
        MODEL,
        method,
        Optim(global_batch=images),
        Compute(strategy="single", precision="float32", device="cpu"),
        seed=0,
        steps_per_epoch=1,
    )
    batch = MicroBatch(torch.zeros(images, 32, 48, 3, dtype=torch.uint8), torch.arange(images))
    # Fused attention recomputes its scores in the backward pass, which the formula leaves out.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        train_step(state, [batch])
    assert counter.get_total_flops() / images == step_flops(MODEL, method)


def test_a_vit_bs_step_is_what_the_design_says() -> None:
    assert step_flops(Model(), Method(attentive=False)) == pytest.approx(28.0e9, rel=0.02)
    assert step_flops(Model(), Method()) == pytest.approx(61.0e9, rel=0.02)


def test_a_peak_is_no_less_than_one_product_shows() -> None:
    peak = matmul_peak(torch.device("cpu"), torch.float32)
    a = torch.randn(256, 256)
    start = time.perf_counter()
    torch.mm(a, a)
    assert peak > 2 * 256**3 / (time.perf_counter() - start) / 4
