import pytest
from torch import nn

from droppos.config import Method, Model, Optim
from droppos.model import DropPos
from droppos.schedule import learning_rate, parameter_groups, sigma


def test_the_rate_climbs_from_0_peaks_after_warm_up_and_ends_at_its_minimum() -> None:
    optim = Optim(epochs=100, warmup_epochs=10, min_lr=1e-6)
    rates = [learning_rate(optim, epoch / 10) for epoch in range(1001)]
    assert rates[0] == 0
    assert max(rates) == rates[100] == pytest.approx(optim.peak_lr)
    assert rates[-1] == pytest.approx(1e-6)
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)


@pytest.mark.parametrize("warmup", [0, 5])
def test_no_warm_up_or_nothing_else_is_no_division_by_zero(warmup: float) -> None:
    optim = Optim(epochs=5, warmup_epochs=warmup)
    assert learning_rate(optim, 5.0) >= 0
    assert learning_rate(optim, 0.0) == (optim.peak_lr if warmup == 0 else 0)


@pytest.mark.parametrize(
    ("decay", "epochs", "expected"),
    [
        ("constant", [0, 3.7, 9.9], [2, 2, 2]),
        ("epoch", [0, 0.99, 5.5, 9.9], [2, 2, 1, 0.2]),
        ("step", [0, 2.5, 9.9], [2, 1.5, 0.02]),
        ("epoch_to_zero", [0, 4.5, 9, 9.99], [2, 2 * (1 - 4 / 9), 0, 0]),
    ],
)
def test_sigma_decays(decay: str, epochs: list[float], expected: list[float]) -> None:
    method = Method(sigma=2, sigma_decay=decay)  # pyright: ignore[reportArgumentType]
    assert [sigma(method, epoch, 10) for epoch in epochs] == pytest.approx(expected)


def test_sigma_of_a_single_epoch_that_ends_at_zero_is_zero() -> None:
    assert sigma(Method(sigma=2, sigma_decay="epoch_to_zero"), 0.5, 1) == 0


def test_tokens_and_matrices_decay_biases_and_norms_do_not() -> None:
    model = DropPos(
        Model(size="tiny", image_size=(32, 32), depth=1, decoder_width=32, decoder_heads=4),
        Method(objective="position_pixels", mask_ratio=0.5),
    )
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0)
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in plain["params"])
    tokens = {"dropped_token", "encoder.cls_token", "pixel_decoder.mask_token"}
    assert tokens <= {names[id(p)] for p in decayed["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)
    assert all(isinstance(p, nn.Parameter) for p in plain["params"])
