"""Features, and what is done with them: nearest neighbours and the linear probe."""

import pytest
import torch
from torch import Tensor

import droppos.measure.knn as knn
from droppos.config import Model
from droppos.encoder import build_encoder
from droppos.errors import DataError
from droppos.measure.features import extract_features
from droppos.measure.knn import knn_accuracy
from droppos.measure.probe import linear_probe
from droppos.model import normalise


def clusters(count: int, seed: int, spread: float = 0.2) -> tuple[Tensor, Tensor]:
    """Points around four corners, far from the origin."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    corners = torch.tensor([[1.0, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]]) + 50
    return corners[labels] + spread * torch.randn(count, 3, generator=random), labels


def noise(count: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=random), torch.randint(4, (count,), generator=random)


def test_separate_clusters_are_told_apart() -> None:
    known, asked = clusters(80, 0), clusters(40, 1)
    assert knn_accuracy(*known, *asked).value == 1
    assert linear_probe(*known, *asked).accuracy.value == 1


def test_noise_scores_chance() -> None:
    known, asked = noise(400, 0), noise(1000, 1)
    for accuracy in (knn_accuracy(*known, *asked), linear_probe(*known, *asked).accuracy):
        assert accuracy.value == pytest.approx(0.25, abs=0.06)


def test_fewer_known_pictures_than_neighbours_all_vote() -> None:
    known, asked = clusters(8, 0), clusters(8, 1)
    assert knn_accuracy(*known, *asked, k=20) == knn_accuracy(*known, *asked, k=8)


def test_a_small_block_of_similarities_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = noise(50, 0), noise(70, 1)
    whole = knn_accuracy(*known, *asked)
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", 150)
    assert knn_accuracy(*known, *asked) == whole


def test_the_nearest_of_two_unlike_neighbours_wins() -> None:
    known = torch.tensor([[1.0, 0.1], [-1.0, 0.0], [0.0, -0.1]])
    labels = torch.tensor([0, 1, 2])
    assert knn_accuracy(known, labels, known, labels).value == 1


def test_the_probe_is_repeatable_and_survives_a_dead_channel() -> None:
    (train, labels), (test, truth) = clusters(60, 0, spread=1.0), clusters(60, 1, spread=1.0)
    train, test = (torch.cat([x, torch.ones(60, 1)], dim=1) for x in (train, test))
    first = linear_probe(train, labels, test, truth)
    assert first == linear_probe(train, labels, test, truth)
    assert first.accuracy.value > 0.5
    assert first.validation[first.l2].value == max(p.value for p in first.validation.values())


def test_the_probe_does_not_look_at_the_test_pictures_to_choose() -> None:
    train, test = clusters(60, 0, spread=1.0), noise(60, 1)
    wrong = linear_probe(*train, test[0][:, :3], test[1])
    right = linear_probe(*train, *clusters(60, 1))
    assert (wrong.l2, wrong.validation) == (right.l2, right.validation)


def test_labels_that_are_missing_are_refused() -> None:
    features, labels = clusters(8, 0)
    with pytest.raises(DataError, match="one label each, got 0"):
        knn_accuracy(features[:0], labels[:0], features, labels)
    with pytest.raises(DataError, match="2 of 8 asked pictures have no label"):
        asked = labels.clone()
        asked[:2] = -1
        knn_accuracy(features, labels, features, asked)
    with pytest.raises(DataError, match="needs 2 classes"):
        linear_probe(features, torch.zeros_like(labels), features, labels)


def test_features_do_not_depend_on_the_batch_and_leave_the_mode() -> None:
    model = Model(image_size=(32, 48), patch_size=16, width=16, depth=1, heads=2)
    encoder = build_encoder(model).train()
    pictures = torch.randint(256, (5, 32, 48, 3), dtype=torch.uint8)
    one, many = (extract_features(encoder, pictures, batch=batch) for batch in (1, 4))
    torch.testing.assert_close(one, many)
    assert encoder.training
    with torch.no_grad():
        tokens = encoder.eval().forward_features(normalise(pictures))
    torch.testing.assert_close(many.class_token, tokens[:, 0])
    torch.testing.assert_close(many.patch_mean, tokens[:, 1:].mean(1))


def test_no_pictures_have_no_features() -> None:
    encoder = build_encoder(Model(image_size=(16, 16), width=16, depth=1, heads=2))
    with pytest.raises(DataError, match="no pictures"):
        extract_features(encoder, torch.zeros(0, 16, 16, 3, dtype=torch.uint8))
