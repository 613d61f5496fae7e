import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from droppos.errors import TrainingError
from droppos.measure.rank import effective_rank


@pytest.mark.parametrize(("pictures", "channels"), [(8, 8), (20, 6), (5, 12)])
def test_orthonormal_directions_count_fully(pictures: int, channels: int) -> None:
    basis = torch.linalg.qr(torch.randn(max(pictures, channels), min(pictures, channels))).Q
    features = basis if pictures >= channels else basis.T
    assert effective_rank(3 * features) == pytest.approx(min(pictures, channels), rel=1e-5)


def test_features_on_one_line_have_rank_1() -> None:
    assert effective_rank(torch.randn(30, 1) * torch.randn(7)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(4, 3)) == 1


def test_two_directions_weigh_by_their_entropy() -> None:
    # Singular values 3 and 1: shares 3/4 and 1/4, entropy ln 4 - 3/4 ln 3.
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_rank_is_bounded(pictures: int, channels: int, seed: int) -> None:
    features = torch.randn(pictures, channels, generator=torch.Generator().manual_seed(seed))
    rank = effective_rank(features)
    assert 1 - 1e-9 <= rank <= min(pictures, channels) + 1e-9
    assert effective_rank(100 * features) == pytest.approx(rank)


def test_features_that_are_not_finite_have_no_rank() -> None:
    with pytest.raises(TrainingError, match="NaN or infinity"):
        effective_rank(torch.tensor([[1.0, float("nan")]]))
