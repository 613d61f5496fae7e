import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from droppos.config import Method
from droppos.errors import DataError
from droppos.measure.components import components, patch_features
from droppos.model import DropPos, normalise
from tests.droppos.tiny import TINY


@given(st.integers(0, 1000))
def test_colours_do_not_depend_on_the_order_of_pictures(seed: int) -> None:
    features = torch.randn(5, 12, 8, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        components(features[order]).colours, components(features).colours[order]
    )


def test_shares_of_variance_fall_and_stay_below_one() -> None:
    torch.manual_seed(0)
    shares = components(torch.randn(6, 20, 10)).explained
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    assert sum(shares) < 1


def test_two_kinds_of_patch_get_the_two_ends_of_the_first_colour() -> None:
    torch.manual_seed(0)
    kind = torch.arange(24).reshape(2, 12) % 2
    features = 20.0 * kind[..., None] * torch.tensor([0.0, 1, 0, 0, 0]) + torch.randn(2, 12, 5)
    red = components(features).colours[..., 0]
    assert red[kind == 1].min() > red[kind == 0].max()  # up: the moving channel's own sign


def test_patches_that_are_all_alike_have_the_middle_colour() -> None:
    found = components(torch.ones(3, 9, 7))
    torch.testing.assert_close(found.colours, torch.full((3, 9, 3), 0.5))
    assert found.explained == (0, 0, 0) and found.place == 0


def test_place_is_all_where_every_picture_is_the_same_and_none_where_cells_are_alike() -> None:
    torch.manual_seed(0)
    same = torch.randn(1, 16, 6).expand(4, -1, -1) + 1e-4 * torch.randn(4, 16, 6)
    assert components(same).place == pytest.approx(1, abs=1e-4)
    assert components(torch.randn(400, 16, 6)).place == pytest.approx(0, abs=2e-3)
    assert components(torch.randn(3, 400, 6)).place == pytest.approx(0, abs=0.05)


def test_too_few_patches_are_refused() -> None:
    with pytest.raises(DataError, match="take more pictures"):
        components(torch.randn(1, 3, 16))


def test_features_are_the_encoders_patch_tokens() -> None:
    torch.manual_seed(0)
    droppos = DropPos(TINY, Method()).eval()
    pictures = torch.randint(256, (2, 32, 48, 3), dtype=torch.uint8)
    tokens = droppos.encode_whole(normalise(pictures))
    torch.testing.assert_close(patch_features(droppos.encoder, pictures), tokens[:, 1:].detach())
