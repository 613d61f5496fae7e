"""Fine-tuning: the classifier, its groups of parameters, and the step."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from droppos.config import Compute, Optim
from droppos.encoder import build_encoder
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.measure.finetune import (
    FinetuneState,
    Labelled,
    _drawing,
    build_classifier,
    count_right,
    finetune_step,
)
from droppos.measure.finetune_recipe import Finetune
from droppos.model import normalise
from tests.droppos.tiny import TINY

CPU = torch.device("cpu")
FLOAT = Compute(strategy="single", precision="float32", device="cpu")
QUICK = Finetune(
    optim=Optim(epochs=20, global_batch=16, lr_per_256=2e-2, warmup_epochs=1, clip_norm=None)
)
PLAIN = replace(
    QUICK, mixup=0, cutmix=0, random_erasing=0, label_smoothing=0, drop_path=0, layer_decay=1
)


def encoder_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_encoder(TINY).state_dict()


def state_of(finetune: Finetune, classes: int = 4, **told: Any) -> FinetuneState:
    model = build_classifier(encoder_state(), TINY, classes, finetune)
    return FinetuneState.create(
        finetune, model, classes, compute=FLOAT, steps_per_epoch=1, device=CPU, **told
    )


def pictures(count: int = 16) -> Labelled:
    """Pictures of four colours, with noise: anybody can tell them apart."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    colours = torch.tensor([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 60]])
    noise = torch.randint(-30, 30, (count, 32, 48, 3), generator=random)
    images = (colours[labels][:, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return Labelled(images, labels)


def weights(state: FinetuneState) -> Tensor:
    return torch.cat([value.flatten() for value in state.model.state_dict().values()])


def test_the_classifier_is_the_encoder_with_a_head_that_knows_nothing() -> None:
    encoder = build_encoder(TINY)
    model = build_classifier(encoder.state_dict(), TINY, 7, replace(QUICK, drop_path=0.2)).eval()
    images = normalise(pictures(2).images)
    with torch.no_grad():
        tokens = model.forward_features(images)
        torch.testing.assert_close(encoder.eval().norm(tokens), encoder.forward_features(images))
        pooled = model.forward_head(tokens, pre_logits=True)
        mean = tokens[:, 1:].mean(1)
        torch.testing.assert_close(pooled, torch.nn.functional.layer_norm(mean, (48,), eps=1e-6))
        assert model(images).abs().max() < 1e-2
    assert [block.drop_path1.drop_prob for block in model.blocks[1:]] == [pytest.approx(0.2)]
    assert model.pos_embed is not None and model.pos_embed.requires_grad


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"blocks\.1.* not those|not those .*blocks\.1"):
        build_classifier(encoder_state(), replace(TINY, depth=1), 4, QUICK)


def test_rates_fall_by_the_layer_and_one_dimension_does_not_decay() -> None:
    state = state_of(replace(QUICK, layer_decay=0.5))
    names = {id(value): name for name, value in state.model.named_parameters()}
    scale, decay = {}, {}
    for group in state.optimizer.param_groups:
        for value in group["params"]:
            name = names[id(value)]
            scale[name], decay[name] = group["lr_scale"], group["weight_decay"]
    assert scale.keys() == dict(state.model.named_parameters()).keys()
    assert scale["head.weight"] == scale["fc_norm.weight"] == 1
    assert scale["blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["blocks.0.mlp.fc1.weight"] == 0.25
    assert scale["patch_embed.proj.weight"] == scale["pos_embed"] == 0.125
    assert {name for name, value in decay.items() if value == 0} == {
        name
        for name, value in state.model.named_parameters()
        if value.ndim == 1 or name in {"pos_embed", "cls_token"}
    }


@pytest.mark.parametrize("finetune", [QUICK, PLAIN])
def test_it_learns_to_tell_colours_apart(finetune: Finetune) -> None:
    state, batch = state_of(finetune), pictures()
    for _ in range(20):
        loss = finetune_step(state, [batch])
    assert loss.isfinite()
    assert count_right(state, batch.images, batch.labels)[0] >= 14


def test_the_first_loss_is_a_blind_guess() -> None:
    loss = finetune_step(state_of(QUICK), [pictures()])
    assert loss.item() == pytest.approx(np.log(4), abs=0.01)


def test_a_run_that_resumes_draws_what_it_would_have_drawn() -> None:
    through = state_of(QUICK)
    for _ in range(4):
        finetune_step(through, [pictures()])
    first = state_of(QUICK)
    for _ in range(2):
        finetune_step(first, [pictures()])
    again = state_of(QUICK)
    again.model.load_state_dict(first.model.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.step = first.step
    torch.manual_seed(77)
    np.random.seed(77)
    random.seed(77)
    for _ in range(2):
        finetune_step(again, [pictures()])
    assert torch.equal(weights(through), weights(again))


def test_ranks_draw_each_their_own() -> None:
    one, other = state_of(QUICK), state_of(QUICK, rank=1)
    for _ in range(2):  # the first step of the warm-up moves nothing
        finetune_step(one, [pictures()])
        finetune_step(other, [pictures()])
    assert not torch.equal(weights(one), weights(other))


def test_the_callers_generators_are_put_back() -> None:
    """Of the context alone: beartype, which checks calls in tests, draws from Python's."""
    state = state_of(QUICK)

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    expected = draw()
    torch.set_rng_state(generators[0])
    np.random.set_state(generators[1])
    random.setstate(generators[2])
    with _drawing(state):
        first = draw()
    assert draw() == expected
    with _drawing(state):
        assert draw() == first


def test_accumulated_micro_batches_are_one_batch() -> None:
    batch, (one, two) = pictures(), (state_of(PLAIN), state_of(PLAIN))
    whole = finetune_step(one, [batch])
    parts = [Labelled(batch.images[i : i + 8], batch.labels[i : i + 8]) for i in (0, 8)]
    torch.testing.assert_close(finetune_step(two, parts), whole)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_mixing_wants_pairs() -> None:
    batch = pictures()
    odd = Labelled(batch.images[:15], batch.labels[:15])
    with pytest.raises(DataError, match="pairs, got a micro-batch of 15"):
        finetune_step(state_of(QUICK), [odd])
    assert finetune_step(state_of(PLAIN), [odd]).isfinite()


def test_counting_leaves_the_mode_and_knows_the_five_likeliest() -> None:
    state, batch = state_of(QUICK, classes=8), pictures()
    head = state.model.head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([5.0, 4, 3, 0, 2, 1, -1, -2]))  # class 3 is sixth
    state.model.train()
    assert count_right(state, batch.images, batch.labels).tolist() == [4, 12]
    assert state.model.training


def test_one_that_diverged_counts_nothing() -> None:
    state, batch = state_of(PLAIN), pictures(4)
    with torch.no_grad():
        next(state.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite: it diverged"):
        count_right(state, batch.images, batch.labels)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer_decay": 0.0},
        {"drop_path": 1.0},
        {"mixup": -1.0},
        {"cutmix": float("inf")},
        {"label_smoothing": 1.0},
        {"random_erasing": -0.1},
        {"crop_scale": (0.5, 0.2)},
        {"augment": "augmix-m5"},
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(QUICK, **wrong)


def test_the_defaults_are_the_published_recipe() -> None:
    published = Finetune()
    assert published.optim.peak_lr == 2e-3
    assert (published.optim.epochs, published.optim.warmup_epochs) == (100, 5)
    assert (published.mixup, published.cutmix, published.random_erasing) == (0.8, 1.0, 0.25)
