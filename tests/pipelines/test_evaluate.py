"""An evaluation from a folder to its figures, on the terminal and in MLflow."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from droppos.config import Method
from droppos.errors import ConfigError, DataError
from droppos.export.flow import export
from droppos.export.timm_vit import TIMM
from droppos.measure.intervals import Proportion
from droppos.model import DropPos
from droppos.trained import Trained
from pipelines import evaluate as job
from pipelines.backbone import open_backbone
from pipelines.evaluate import Evaluation, Probe, evaluate, track
from pipelines.holdout import choose
from pipelines.prepare import prepare
from pipelines.recipe import MeasureProtocol, Tracking
from pipelines.report import evaluation_rows
from pipelines.scores import Origin, name_in
from pipelines.shards import load_manifest
from pipelines.spread import Spread
from pipelines.storage import open_place
from tests.droppos.tiny import TINY

MEASURE = MeasureProtocol(mask_ratio=0.25, pictures=20)


@pytest.fixture(scope="module")
def data(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("evaluate") / "validation"
    prepare(str(photographs), str(folder), group_rows=6)
    return str(folder)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("backbone") / "out"
    task = DropPos(TINY, Method(mask_ratio=0.25)).eval()
    export(Trained(task.encoder, TINY, task), out, TIMM)
    return str(out)


@pytest.fixture(scope="module")
def measured(backbone: str, data: str) -> Evaluation:
    return evaluate(backbone, data, measure=MEASURE)


def test_each_accuracy_stands_with_its_interval(measured: Evaluation) -> None:
    metrics = measured.metrics()
    accuracies = {name for name in metrics if name.endswith(("accuracy", "within_one_cell"))}
    assert accuracies == {
        "position/accuracy",
        "position/accuracy_within_one_cell",
        "features/knn_accuracy",
        "features/probe_accuracy",
        "features/probe_top_5_accuracy",  # of six classes
    }
    for name in accuracies:
        low, high = metrics[f"{name}_low_95"], metrics[f"{name}_high_95"]
        assert 0 <= low < high <= 1 and low <= metrics[name] <= high
    rows = dict(evaluation_rows(measured))
    for row in ("placed right", "20 nearest neighbours", "linear probe", "  among the first five"):
        assert " % (" in rows[row] and " to " in rows[row]


def test_another_data_set_to_learn_from_labels_all_pictures(backbone: str, data: str) -> None:
    found = evaluate(backbone, data, train=data, measure=MEASURE)
    assert found.knn is not None and found.knn.total == 72
    assert found.train == open_place(data).uri


def test_features_are_of_as_many_blocks_as_are_asked_for(backbone: str, data: str) -> None:
    depth = open_backbone(backbone).model.shape.depth
    one, all_of_them = (evaluate(backbone, data, measure=MEASURE, blocks=n) for n in (1, depth))
    assert depth > 1 and all_of_them.width == depth * one.width
    assert "features" not in dict(evaluation_rows(one))
    assert dict(evaluation_rows(all_of_them))["features"].startswith(f"of the last {depth} blocks")
    with pytest.raises(ConfigError, match=rf"--blocks must be from 1 to the {depth} that"):
        evaluate(backbone, data, measure=MEASURE, blocks=depth + 1)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd", "lars"])
def test_the_probe_is_told_with_its_solver(
    backbone: str, data: str, solver: job.Solver, tmp_path: Path
) -> None:
    found = evaluate(
        backbone, data, measure=MEASURE, probe=solver, spread=Spread(cache=str(tmp_path))
    )
    assert found.probe is not None and found.probe.solver.startswith(solver)
    assert len(list(tmp_path.rglob("part-*"))) == 1


def test_what_does_not_fit_is_probed_by_gradient_descent(
    backbone: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "EXACT_VALUES", 1000)
    found = evaluate(backbone, data, measure=MEASURE)
    assert found.probe is not None and found.probe.solver.startswith("sgd")


def test_pictures_without_labels_have_no_classes_to_tell(
    backbone: str, photographs: Path, data: str, tmp_path: Path
) -> None:
    prepare(str(photographs / "cat"), str(tmp_path / "cats"))
    found = evaluate(backbone, str(tmp_path / "cats"), measure=MEASURE)
    assert found.knn is None and found.probe is None and found.position is not None
    assert "has no labels" in " ".join(found.notes)
    with pytest.raises(DataError, match="must be the same"):
        evaluate(backbone, data, train=str(tmp_path / "cats"), measure=MEASURE)


def test_what_labels_do_not_allow_is_told_and_ends_nothing(
    backbone: str, photographs: Path, data: str, tmp_path: Path
) -> None:
    alone = evaluate(backbone, data, measure=MEASURE, limit=1)
    assert alone.knn is None and alone.probe is None and alone.position is not None
    assert "are too few" in " ".join(alone.notes)
    for file in [*sorted(photographs.glob("cat/*"))[:2], *sorted(photographs.glob("coffee/*"))[:2]]:
        copy = tmp_path / "few" / file.relative_to(photographs)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    prepare(str(tmp_path / "few"), str(tmp_path / "prepared"))
    four = str(tmp_path / "prepared")
    few = evaluate(backbone, four, train=four, measure=MEASURE)
    assert few.knn is not None and few.probe is None
    assert "4 labelled pictures to learn from are too few, it takes 5" in " ".join(few.notes)


def test_one_class_among_several_teaches_nothing() -> None:
    one = job._Labelled(torch.zeros(9, 2), torch.full((9,), 3))
    two = job._Labelled(torch.zeros(9, 2), torch.arange(9) % 2)
    assert "all of one class" in str(job._why_not(one, two))
    assert job._why_not(two, one) is None


def test_a_cpu_that_is_asked_for_is_taken_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [job.device(Spread(device=device)).type for device in ("auto", "cpu", "cuda")]
    assert found == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert job.device(Spread(device="cuda")).type == "cpu"


def test_pictures_without_a_label_among_others_are_left_out(
    backbone: str, photographs: Path, tmp_path: Path
) -> None:
    files = sorted(file for file in photographs.rglob("*") if file.is_file())
    labels = [None if i < 3 else i % 4 for i in range(len(files))]
    images = pa.array([{"bytes": file.read_bytes(), "path": None} for file in files])
    table = pa.table({"image": images, "label": labels})
    (tmp_path / "given").mkdir()
    pq.write_table(table, str(tmp_path / "given" / "some.parquet"))
    prepare(str(tmp_path / "given"), str(tmp_path / "some"))
    some = str(tmp_path / "some")
    found = evaluate(backbone, some, train=some, measure=MEASURE)
    told = f"3 of {len(files)} pictures of {some} have no label, and are left out"
    assert sum(told in note for note in found.notes) == 2
    assert found.knn is not None and found.knn.total == len(files) - 3
    assert found.probe is not None and found.pictures == len(files)
    parted = evaluate(backbone, some, measure=MEASURE)
    assert parted.knn is not None and 0 < parted.knn.total < len(files) - 3


@pytest.mark.parametrize("limit", [0, -5])
def test_no_picture_at_all_is_refused(backbone: str, data: str, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"--pictures must be 1 or more, got {limit}"):
        evaluate(backbone, data, measure=MEASURE, limit=limit)
    assert choose(load_manifest(open_place(data)), 0) == []


def test_five_classes_have_no_first_five() -> None:
    probe = Probe(Proportion(3, 4), None, "lbfgs, l2 1")
    found = Evaluation("b", "d", None, 4, "as ever", 1, 0, None, probe, None, 1.0, 2)
    assert not any("top_5" in name for name in found.metrics())
    assert len(evaluation_rows(found)) == 3


def test_a_checkpoint_tells_its_run() -> None:
    origin = Origin.of("s3://bucket/runs/mine/checkpoints/step-00000120")
    assert origin == Origin("s3://bucket/runs", "s3://bucket/runs/mine", 120)
    assert Origin.of("/some/export") == Origin(None, None, 0)


def test_two_data_sets_of_one_last_folder_have_two_names() -> None:
    first, second = "s3://bucket/birds/validation", "s3://bucket/cats/validation"
    tags = {"evaluation.validation.data": first}
    assert name_in({}, first) == name_in(tags, first) == "validation"
    other = name_in(tags, second)
    assert other == name_in(tags, second) and re.fullmatch("validation-[0-9a-f]{6}", other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_figures_go_to_the_run_that_made_the_backbone_and_leave_its_state(
    measured: Evaluation, tmp_path: Path
) -> None:
    from dataclasses import replace

    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    alone = track(measured, Tracking(uri=uri))
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(alone)
    assert run.info.status == "FINISHED" and run.info.run_name == "evaluate validation"
    assert measured.knn is not None
    name = "evaluation/validation/features/knn_accuracy"
    assert run.data.metrics[name] == measured.knn.value
    assert run.data.metrics[f"{name}_low_95"] == measured.knn.interval[0]
    assert run.data.tags["evaluation.validation.backbone"] == measured.backbone
    assert run.data.tags["evaluation.validation.train"] == "none"

    home = str(tmp_path / "runs" / "mine")
    own = client.create_run(run.info.experiment_id, tags={"droppos.home": home}).info.run_id
    client.set_terminated(own, "KILLED")
    of_run = replace(measured, backbone=f"{home}/checkpoints/step-00000120")
    assert track(of_run, Tracking(uri=uri)) == own
    assert client.get_run(own).info.status == "KILLED"
    (point,) = client.get_metric_history(own, name)
    assert (point.step, point.value) == (120, measured.knn.value)
