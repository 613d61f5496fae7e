import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droppos.config import Counts, Method
from droppos.masking import draw, draw_noise, draw_patches


@st.composite
def some_counts(pick: st.DrawFn) -> Counts:
    cells = pick(st.integers(2, 60))
    visible = pick(st.integers(1, cells))
    return Counts(cells, visible, pick(st.integers(0, visible - 1)))


def noise(counts: Counts, method: Method, images: int = 5, seed: int = 0):
    return draw_noise(counts, method, torch.Generator().manual_seed(seed), images)


@given(counts=some_counts(), shuffle=st.booleans(), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_a_draw_parts_the_cells(counts: Counts, shuffle: bool, seed: int) -> None:
    method = Method(shuffle=shuffle)
    masks = draw(counts, method, noise(counts, method, seed=seed))
    assert (masks.dropped.sum(dim=1) == counts.scored).all()
    cells = torch.cat([masks.visible, masks.hidden], dim=1).sort(dim=1).values
    assert (cells == torch.arange(counts.cells)).all()


def test_shuffling_keeps_what_is_seen_and_asked() -> None:
    counts = Counts(36, 9, 2)
    plain, shuffled = Method(), Method(shuffle=True)
    generator = torch.Generator().manual_seed(3)
    drawn = draw_noise(counts, shuffled, generator, 4)
    a = draw(counts, plain, drawn._replace(order=None))
    b = draw(counts, shuffled, drawn)
    assert (a.visible != b.visible).any()
    for i in range(4):
        pairs = [
            dict(zip(m.visible[i].tolist(), m.dropped[i].tolist(), strict=True)) for m in (a, b)
        ]
        assert pairs[0] == pairs[1]


def test_masks_depend_on_the_slot_not_on_who_shares_the_batch() -> None:
    counts, method = Counts(36, 9, 2), Method(dropped_token="wrong", shuffle=True)
    whole = draw(counts, method, noise(counts, method, images=8))
    for slots in (torch.tensor([6, 1]), torch.tensor([3])):
        part = draw(counts, method, noise(counts, method, images=8).of(slots))
        for ours, theirs in zip(part, whole, strict=True):
            assert ours is not None and theirs is not None
            assert (ours == theirs[slots]).all()


def test_each_patch_is_as_likely_visible_and_dropped() -> None:
    counts = Counts(16, 8, 2)
    masks = draw(counts, Method(), noise(counts, Method(), images=4000))
    seen = torch.bincount(masks.visible.flatten(), minlength=16) / 4000
    asked = torch.bincount(masks.visible[masks.dropped], minlength=16) / 4000
    assert (seen - 0.5).abs().max() < 0.05
    assert (asked - 0.375).abs().max() < 0.05


def test_wrong_positions_are_a_permutation_of_each_image_and_one_for_all_in_the_reference() -> None:
    counts = Counts(36, 36, 9)
    paper = Method(dropped_token="wrong", mask_ratio=0)
    masks = draw(counts, paper, noise(counts, paper))
    assert masks.wrong is not None
    assert (masks.wrong.sort(dim=1).values == torch.arange(36)).all()
    maps = masks.wrong.gather(1, masks.visible.argsort(dim=1))  # by true cell
    assert (maps[0] != maps[1]).any()

    reference = Method(dropped_token="wrong", mask_ratio=0, conformance="reference")
    masks = draw(counts, reference, noise(counts, reference))
    assert masks.wrong is not None
    maps = masks.wrong.gather(1, masks.visible.argsort(dim=1))
    assert (maps == maps[:1]).all()


def test_smallest_noise_is_visible_and_keeps_its_position() -> None:
    masks = draw_patches(
        Counts(4, 3, 1), torch.tensor([[0.9, 0.1, 0.5, 0.3]]), torch.tensor([[0.7, 0.2, 0.4]])
    )
    assert masks.visible.tolist() == [[1, 3, 2]]
    assert masks.dropped.tolist() == [[True, False, True]]
    assert masks.hidden.tolist() == [[0]]
