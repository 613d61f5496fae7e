"""What is asked of held-out pictures: by one process, and by ranks that share them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from droppos.config import Compute, Method
from droppos.measure.features import extract_features
from droppos.measure.knn import knn_leave_one_out
from droppos.measure.position import PositionMeter, measure_positions, position_predictor
from droppos.measure.rank import effective_rank
from droppos.model import DropPos
from pipelines.holdout import Holdout
from pipelines.recipe import HELD_OUT
from tests.droppos.ranks import run_program
from tests.pipelines.holdout_ranks import CASES, COMPUTE, MEASURE, MODEL, PICTURES, make_pictures

POSITION = {
    f"holdout/position/{name}"
    for name in (
        "accuracy",
        "accuracy_low_95",
        "accuracy_high_95",
        "accuracy_within_one_cell",
        "accuracy_within_one_cell_low_95",
        "accuracy_within_one_cell_high_95",
        "wrong_beside",
        "wrong_beside_chance",
        "skill",
        "cross_entropy_nats",
        "chance",
    )
}
RANK = {"holdout/features/effective_rank"}
KNN = {
    f"holdout/features/knn_{name}"
    for name in ("accuracy", "accuracy_low_95", "accuracy_high_95", "chance", "skill")
}
CPU = torch.device("cpu")


def measured(
    method: Method, labels: list[int] | None, compute: Compute = COMPUTE
) -> tuple[DropPos, dict[str, float]]:
    torch.manual_seed(0)
    model = DropPos(MODEL, method)
    pictures = replace(make_pictures(), labels=labels)
    return model, Holdout(MEASURE, compute, pictures, CPU).measure(model)


def test_the_figures_are_those_of_the_parts_they_are_made_of() -> None:
    pictures = make_pictures()
    model, figures = measured(Method(), pictures.labels)
    assert figures.keys() == POSITION | RANK | KNN
    assert figures.keys() >= set(HELD_OUT)  # what a checkpoint may be the best by
    assert model.training

    model.eval()
    meter = PositionMeter(MODEL.grid, MEASURE.counts(MODEL.grid))
    report = measure_positions(position_predictor(model), pictures.pixels, meter, seed=MEASURE.seed)
    position = report.report().metrics()
    features = extract_features(model.encoder, pictures.pixels)
    knn = knn_leave_one_out(features, torch.tensor(pictures.labels)).metrics()
    expected = position | {"features/effective_rank": effective_rank(features)} | knn
    expected = {f"holdout/{name}": value for name, value in expected.items()}
    assert figures == pytest.approx(expected, rel=1e-5)
    assert 0 < figures["holdout/features/knn_skill"] < 1
    assert 1 < figures["holdout/features/effective_rank"] < MODEL.shape.width


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (None, set()),
        ([0] * PICTURES, set()),
        (list(range(PICTURES)), set()),
        ([0] * (PICTURES - 1) + [1], KNN),
    ],
    ids=["none", "one class", "a class each", "two classes"],
)
def test_neighbours_are_asked_where_labels_allow_it(
    labels: list[int] | None, names: set[str]
) -> None:
    assert measured(Method(), labels)[1].keys() == POSITION | RANK | names


def test_a_model_of_pixels_has_features_and_no_positions() -> None:
    assert measured(Method(objective="pixels"), None)[1].keys() == RANK


def test_half_precision_rounds_the_model_and_not_its_figures() -> None:
    """An fsdp2 run's model that is whole again computes in the precision it was trained in."""
    labels = make_pictures().labels
    half, sharded = (
        measured(Method(), labels, replace(COMPUTE, strategy=strategy, precision="bf16"))[1]
        for strategy in ("single", "fsdp2")
    )
    whole = measured(Method(), labels)[1]
    assert half == sharded != whole
    name = "holdout/features/effective_rank"
    assert half[name] == pytest.approx(whole[name], rel=0.05)


def test_the_ratios_of_training_change_no_protocol() -> None:
    """Nor does another seed of the masks change features."""
    _, one = measured(Method(), None)
    _, other = measured(Method(mask_ratio=0.2, position_mask_ratio=0.4), None)
    assert one == other
    torch.manual_seed(0)
    holdout = Holdout(replace(MEASURE, seed=5), COMPUTE, make_pictures(), CPU)
    again = holdout.measure(DropPos(MODEL, Method()))
    assert (
        again["holdout/position/cross_entropy_nats"] != one["holdout/position/cross_entropy_nats"]
    )
    assert again["holdout/features/effective_rank"] == one["holdout/features/effective_rank"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("holdout")
    run_program("tests.pipelines.holdout_ranks", folder)
    return torch.load(Path(folder) / "found.pt", weights_only=True)


@pytest.mark.shares
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_that_share_the_pictures_find_what_one_process_finds(
    case: Any, ranks: dict[str, Any]
) -> None:
    """75 pictures, so that one rank has more than another, and one of four has none."""
    alone, found = ranks["alone"], ranks[case.name]
    assert alone.keys() == POSITION | RANK | KNN
    assert len(found) == case.world
    for figures in found:
        assert figures == found[0]  # run.keep_best is decided by each rank
        assert figures == pytest.approx(alone, rel=1e-6)
