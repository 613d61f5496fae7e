import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droppos.config import Grid, Method, Model
from droppos.errors import ConfigError
from droppos.targets import attentive_weights, smoothed_targets

GRIDS = st.builds(Grid, st.integers(1, 12), st.integers(1, 12))


@given(grid=GRIDS, sigma=st.floats(0, 1e6))
@settings(max_examples=60, deadline=None)
def test_every_row_is_a_distribution_with_its_peak_at_home(grid: Grid, sigma: float) -> None:
    targets = smoothed_targets(grid, sigma)
    assert targets.shape == (grid.cells, grid.cells)
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(grid.cells))
    assert (targets.diagonal() == targets.max(dim=1).values).all()


def test_sigma_0_is_one_hot_and_a_tiny_sigma_nearly() -> None:
    assert (smoothed_targets(Grid(3, 5), 0) == torch.eye(15)).all()
    torch.testing.assert_close(smoothed_targets(Grid(3, 5), 1e-3), torch.eye(15))


def test_the_ratio_of_neighbour_to_home_is_exp_of_minus_one_over_sigma_squared() -> None:
    row = smoothed_targets(Grid(5, 7), 2.0)[Grid(5, 7).columns * 2 + 3]
    home, right, below = row[17], row[18], row[24]
    expected = torch.tensor(-1 / 4).exp()
    torch.testing.assert_close(right / home, expected)
    torch.testing.assert_close(below / home, expected)


def test_the_references_rows_are_no_distributions() -> None:
    sums = smoothed_targets(Grid(6, 6), 1.0, "reference").sum(dim=1)
    assert sums.min() == pytest.approx(0.886, abs=1e-3)
    assert sums.max() == pytest.approx(1.110, abs=1e-3)


def test_as_trained_the_reference_mistakes_its_neighbours() -> None:
    intended = smoothed_targets(Grid(14, 14), 1.0)
    trained = smoothed_targets(Grid(14, 14), 1.0, "reference_as_trained")
    variation = (trained - intended).abs().sum(dim=1).mean() / 2
    assert variation.item() == pytest.approx(0.37, abs=0.005)
    with pytest.raises(ConfigError, match="14 x 14"):
        smoothed_targets(Grid(6, 6), 1.0, "reference_as_trained")
    with pytest.raises(ConfigError, match="14 x 14"):  # before a cluster is up, whatever sigma
        Method(conformance="reference_as_trained", sigma=0).check(Model(image_size=(96, 96)))


def test_negative_sigma_is_refused() -> None:
    with pytest.raises(ConfigError, match="sigma"):
        smoothed_targets(Grid(2, 2), -0.5)


@given(
    similarity=st.lists(st.floats(-1, 1), min_size=2, max_size=20),
    tau=st.floats(1e-3, 10),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_attentive_weights_sum_to_1_over_the_counted(
    similarity: list[float], tau: float, data: st.DataObject
) -> None:
    some = st.lists(st.booleans(), min_size=len(similarity), max_size=len(similarity))
    counted = torch.tensor([data.draw(some)])
    weights = attentive_weights(torch.tensor([similarity]), counted, tau)
    assert weights.isfinite().all()
    assert (weights[~counted] == 0).all()
    total = 1.0 if counted.any() else 0.0
    assert weights.sum().item() == pytest.approx(total, abs=1e-5)


def test_equal_likeness_gives_equal_weights() -> None:
    counted = torch.tensor([[True, True, False, True]])
    weights = attentive_weights(torch.full((1, 4), 0.3), counted, 0.1)
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3]]))


def test_the_papers_softmax_over_all_patches_gives_the_same_weights() -> None:
    similarity = torch.rand(3, 16) * 2 - 1
    counted = torch.rand(3, 16) < 0.4
    counted[:, 0] = True
    over_all = (similarity / 0.1).softmax(dim=1) * counted
    expected = over_all / over_all.sum(dim=1, keepdim=True)
    torch.testing.assert_close(attentive_weights(similarity, counted, 0.1), expected)
