"""Features, and what is done with them: nearest neighbours and the linear probe."""

import pytest
import torch
from torch import Tensor

import droppos.measure.knn as knn
from droppos.config import Method, Model
from droppos.encoder import build_encoder
from droppos.errors import ConfigError, DataError, TrainingError
from droppos.measure.components import components
from droppos.measure.features import extract_features, patch_mean
from droppos.measure.knn import can_leave_one_out, knn_accuracy, knn_leave_one_out
from droppos.measure.probe import linear_probe
from droppos.model import DropPos, normalise


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


def test_pictures_of_separate_clusters_find_each_other() -> None:
    report = knn_leave_one_out(*clusters(81, 0))
    assert report.accuracy.value == report.skill == 1
    assert report.chance == 21 / 81  # four classes, one of them with one more


def test_pictures_without_a_tell_are_found_by_chance() -> None:
    features, labels = noise(1500, 0)
    report = knn_leave_one_out(features, labels)
    assert report.chance == labels.bincount().max().item() / 1500
    assert report.accuracy.value == pytest.approx(0.25, abs=0.04)
    assert report.skill == pytest.approx(0, abs=0.06)


def test_equal_classes_of_features_that_say_nothing_score_no_more_than_chance() -> None:
    labels = torch.arange(40) % 2
    flat = torch.zeros(40, 3)
    flat[:, 0] = torch.arange(40) % 4 // 2  # two places, both with equally many of each class
    report = knn_leave_one_out(flat, labels, k=19)  # all others there: 10 of the other class, 9 own
    assert (report.accuracy.value, report.chance, report.skill) == (0, 0.5, -1)


def test_a_picture_does_not_vote_for_itself() -> None:
    """Twins find each other; a picture that is the only one of its class finds nobody."""
    features = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    twins = torch.cat([features, features])
    once, both = torch.arange(30), torch.arange(30).repeat(2)
    assert knn_leave_one_out(twins, both, k=1).accuracy.value == 1
    assert knn_accuracy(features, once, features, once, k=1).value == 1  # it would, if it could
    labels = torch.cat([once, torch.tensor([0])])  # all but the first and its twin are alone
    found = knn_leave_one_out(torch.cat([features, features[:1]]), labels, k=1)
    assert found.accuracy.hits == 2


def test_a_class_of_one_picture_cannot_be_found() -> None:
    features, labels = clusters(40, 0)
    labels[7] = 4
    report = knn_leave_one_out(features, labels)
    assert report.accuracy.hits == 39


def test_the_figures_do_not_depend_on_block_or_order(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = noise(70, 0)
    whole = knn_leave_one_out(features, labels)
    order = torch.randperm(70)
    assert knn_leave_one_out(features[order], labels[order]) == whole
    for block in (1, 150, 69 * 70):
        monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", block)
        assert knn_leave_one_out(features, labels) == whole


def test_more_neighbours_than_others_are_all_of_them() -> None:
    assert knn_leave_one_out(*noise(9, 0), k=20) == knn_leave_one_out(*noise(9, 0), k=8)


def test_one_constant_common_to_all_features_says_nothing() -> None:
    features, labels = noise(60, 0)
    assert knn_leave_one_out(features + 4, labels) == knn_leave_one_out(features, labels)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [3]])
def test_labels_that_could_only_be_right_or_only_wrong_are_refused(labels: list[int]) -> None:
    assert not can_leave_one_out(torch.tensor(labels))
    with pytest.raises(DataError, match="two classes, one of them with two pictures"):
        knn_leave_one_out(torch.randn(len(labels), 4), torch.tensor(labels))


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


def test_features_of_a_model_that_diverged_are_no_features() -> None:
    features, labels = clusters(8, 0)
    broken = features.clone()
    broken[3, 1] = torch.nan
    for ask in (
        lambda: knn_leave_one_out(broken, labels),
        lambda: knn_accuracy(features, labels, broken, labels),
        lambda: linear_probe(broken, labels, features, labels),
        lambda: components(broken[None]),
    ):
        with pytest.raises(TrainingError, match="the model diverged"):
            ask()


def test_features_do_not_depend_on_the_batch_and_leave_the_mode() -> None:
    model = Model(image_size=(32, 48), patch_size=16, width=16, depth=1, heads=2)
    encoder = build_encoder(model).train()
    pictures = torch.randint(256, (5, 32, 48, 3), dtype=torch.uint8)
    one, many = (extract_features(encoder, pictures, batch=batch) for batch in (1, 4))
    torch.testing.assert_close(one, many)
    assert encoder.training
    with torch.no_grad():
        tokens = encoder.eval().forward_features(normalise(pictures))
    torch.testing.assert_close(many, tokens[:, 1:].mean(1))


def test_a_model_in_training_sees_a_whole_picture_as_its_backbone_does() -> None:
    model = Model(image_size=(32, 48), patch_size=16, width=16, depth=2, heads=2, decoder_heads=2)
    droppos = DropPos(model, Method()).eval()
    pictures = torch.randint(256, (5, 32, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        tokens = droppos.encode_whole(normalise(pictures))
    features = extract_features(droppos.encoder, pictures)
    torch.testing.assert_close(patch_mean(tokens), features)


def test_features_of_several_blocks_stand_side_by_side_the_last_one_last() -> None:
    model = Model(image_size=(32, 48), patch_size=16, width=16, depth=3, heads=2)
    encoder = build_encoder(model)
    pictures = torch.randint(256, (5, 32, 48, 3), dtype=torch.uint8)
    last, two, three = (extract_features(encoder, pictures, blocks=n) for n in (1, 2, 3))
    assert three.shape == (5, 48)
    torch.testing.assert_close(three[:, 16:], two)
    torch.testing.assert_close(two[:, 16:], last)
    del encoder.blocks[2]  # what was the second of three is the last now
    torch.testing.assert_close(extract_features(encoder, pictures), two[:, :16])
    with pytest.raises(ConfigError, match="from 1 to the 2 that the encoder has, got 3"):
        extract_features(encoder, pictures, blocks=3)


def test_no_pictures_have_no_features() -> None:
    encoder = build_encoder(Model(image_size=(16, 16), width=16, depth=1, heads=2))
    with pytest.raises(DataError, match="no pictures"):
        extract_features(encoder, torch.zeros(0, 16, 16, 3, dtype=torch.uint8))
