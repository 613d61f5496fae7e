"""Fine-tuning as a job: its labels, its augmentation, what it refuses, and a whole run on Ray."""

import os
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from droppos.config import Method, Optim
from droppos.encoder import build_encoder
from droppos.errors import ConfigError, DataError, DivergedError
from droppos.export.flow import export
from droppos.export.timm_vit import TIMM
from droppos.measure.finetune import FinetuneState, build_classifier
from droppos.measure.finetune_recipe import Finetune
from droppos.model import DropPos, normalise
from droppos.trained import Trained
from pipelines import checkpoints, history, receipt, stored_state
from pipelines.attempt import SupersededError, claim_for_driver, claim_for_group
from pipelines.audit import schedule_of
from pipelines.augmented import rand_augment, read_augmented
from pipelines.backbone import Backbone, from_checkpoint
from pipelines.cost import HOURS
from pipelines.events import Events
from pipelines.export import export_checkpoint
from pipelines.extraction import decode, pieces_of
from pipelines.finetune import Finetuned, _check_resume, _facts, finetune, lie_by_class
from pipelines.finetune_run import FinetuneRun
from pipelines.finetune_worker import Tuning, _save, labelled, mean_loss
from pipelines.groundwork import plan
from pipelines.holdout import choose
from pipelines.job import Job
from pipelines.keeper import Keeper
from pipelines.order import Schedule
from pipelines.prepare import prepare
from pipelines.proof import Proof
from pipelines.recipe import Recipe, Tracking
from pipelines.run_report import run_report
from pipelines.shards import load_manifest
from pipelines.storage import open_place
from pipelines.stream import Batch
from pipelines.windows import CropOptions, read_window
from tests.droppos.tiny import TINY

# Notices of Ray, MLflow and SQLAlchemy about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

RECIPE = Finetune(
    optim=Optim(epochs=3, global_batch=12, lr_per_256=5e-2, warmup_epochs=1, clip_norm=None),
    mixup=0.2,
    cutmix=0.2,
)


@pytest.mark.parametrize(
    ("labels", "by_class"),
    [
        ([0] * 50 + [1] * 50, True),
        ([0, 1] * 50, False),
        ([0] * 99 + [1], False),  # hardly anything but one class: mixed would look the same
        ([0] * 12 + [1] * 12 + [2] * 12, True),
        ([0, 0, 1, 2, 2, 1, 0, 1, 2, 0, 1, 1], False),
    ],
)
def test_pictures_that_lie_by_class_are_noticed(labels: list[int], by_class: bool) -> None:
    assert lie_by_class(torch.tensor(labels)) == by_class


@pytest.fixture(scope="module")
def data(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """72 pictures in six classes, to learn and to be asked."""
    folder = str(tmp_path_factory.mktemp("finetune") / "data")
    prepare(str(photographs), folder, group_rows=10)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("backbone") / "out"
    task = DropPos(TINY, Method(mask_ratio=0.25)).eval()
    export(Trained(task.encoder, TINY, task), out, TIMM)
    return str(out)


def tune(
    backbone: str,
    data: str,
    folder: Path,
    recipe: Finetune = RECIPE,
    holdout: str | None = None,
    workers: int = 2,
    min_workers: int | None = None,
    **told: Any,
) -> Finetuned:
    run = FinetuneRun(
        name="tuned",
        storage=str(folder),
        workers=workers,
        min_workers=min_workers,
        decode_cpus=2,
        window=24,
        log_every=1,
        precision="float32",
        device="cpu",
    )
    return finetune(
        backbone,
        data,
        holdout or data,
        recipe,
        run,
        tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
        **told,
    )


def blocks(data: str, start: int = 0, **told: Any) -> list[Mapping[str, np.ndarray]]:
    """Read the first window of an epoch, augmented or not."""
    place = open_place(data)
    schedule = Schedule(manifest=load_manifest(place), seed=3, global_batch=12, window=24, epochs=2)
    window = next(iter(schedule.windows(0)))
    crop = CropOptions((32, 48), (0.08, 1.0), True)
    read = partial(read_augmented, **told) if told else read_window
    found = []
    for block in read(window, start, data=place, crop=crop, global_batch=12, block=12):
        assert block.num_rows == 12
        found.append({name: block[name].to_numpy() for name in ("row", "step", "mirrored")})
        found[-1]["image"] = block["image"].combine_chunks().to_numpy_ndarray()
    return found


def test_crops_are_augmented_and_all_else_stays(data: str) -> None:
    plain, strong = blocks(data), blocks(data, augment="rand-m9-mstd0.5-inc1")
    for one, other in zip(plain, strong, strict=True):
        for name in ("row", "step", "mirrored"):
            assert (one[name] == other[name]).all()
        assert one["image"].shape == other["image"].shape
        changed = (one["image"] != other["image"]).any(axis=(1, 2, 3))
        assert changed.mean() > 0.5


def test_a_picture_is_augmented_alike_wherever_a_task_starts(data: str) -> None:
    whole = blocks(data, augment="rand-m9-mstd0.5-inc1")
    rest = blocks(data, start=12, augment="rand-m9-mstd0.5-inc1")
    assert (rest[0]["row"] == whole[1]["row"]).all()
    assert (rest[0]["image"] == whole[1]["image"]).all()


def test_the_greatest_magnitude_leaves_a_picture() -> None:
    """Once, one in 650 pictures ended a run by the published recipe: Pillow 13 keeps no 0 bits."""
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    for name in ("rand-m10-inc1", "rand-m0", "rand-m0-inc1"):
        made: Any = rand_augment(name, 16)
        keeping = [each for each in made.ops if "Posterize" in each.name]
        assert keeping
        for each in keeping:
            each.prob = 1
            assert np.asarray(each(image)).std() > 50  # not one colour


def test_one_that_stands_in_brings_its_own_label() -> None:
    rows = torch.tensor([5, 2, 7, 0])
    images = rows.to(torch.uint8)[:, None, None, None].expand(4, 8, 8, 3)
    batch = Batch(
        step=0,
        images=images,
        mirrored=torch.tensor([True, False, False, True]),
        rows=rows,
        slots=torch.arange(4, dtype=torch.int32),
        problems={2: "gone", 0: "gone"},
        waited=0.0,
    )
    labels = 10 * torch.arange(8)
    found = labelled(batch, labels)
    assert found.labels.tolist() == [10 * int(image[0, 0, 0]) for image in found.images]
    assert not set(found.labels.tolist()) & {20, 0}
    assert found.mirrored is not None and found.mirrored.tolist()[0]
    with pytest.raises(DataError, match=r"none of the 4 pictures .* gone"):
        labelled(replace(batch, problems=dict.fromkeys((5, 2, 7, 0), "gone")), labels)
    whole = replace(batch, problems={})
    assert labelled(whole, labels).labels.tolist() == [50, 20, 70, 0]


def test_what_cannot_be_learnt_or_asked_is_refused(
    backbone: str, data: str, photographs: Path, tmp_path: Path
) -> None:
    odd = replace(RECIPE, optim=replace(RECIPE.optim, global_batch=6))
    for name in ("rand-q9", "rand-m9.5", "random-m9"):
        with pytest.raises(ConfigError, match=f"augment must be .*'{name}'"):
            tune(backbone, data, tmp_path, replace(RECIPE, augment=name))
    with pytest.raises(ConfigError, match="in pairs, but a worker's micro-batch has 3"):
        tune(backbone, data, tmp_path, odd)
    some = replace(RECIPE, optim=replace(RECIPE.optim, global_batch=20))
    with pytest.raises(ConfigError, match=r"has 1 .*over 4 workers .*or min_workers more than 4"):
        tune(backbone, data, tmp_path, some, workers=5, min_workers=2)
    prepare(str(photographs / "cat"), str(tmp_path / "cats"))
    with pytest.raises(DataError, match="must have the same two or more"):
        tune(backbone, data, tmp_path, holdout=str(tmp_path / "cats"))
    with pytest.raises(ConfigError, match=r"run\.workers"):
        FinetuneRun(workers=0)


@pytest.mark.usefixtures("one_rank")
def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    assert mean_loss(torch.tensor(1.5), 7) == 1.5
    with pytest.raises(DivergedError, match=r"nan at or before step 7.*lr-per-256"):
        mean_loss(torch.tensor(float("nan")), 7)


def facts_of(trained: Backbone, data: str, holdout: str, folder: Path) -> dict[str, Any]:
    run = FinetuneRun(storage=str(folder))
    whole = Recipe(model=trained.model, optim=RECIPE.optim, data=run.data(data, holdout))
    return _facts(trained, RECIPE, whole, plan(whole))


def test_a_checkpoint_is_of_one_number_of_heads(data: str, tmp_path: Path) -> None:
    four = build_encoder(TINY)
    one = build_encoder(replace(TINY, heads=1))
    one.load_state_dict(four.state_dict())
    ours, theirs = (
        facts_of(Backbone(encoder, TINY, None), data, data, tmp_path) for encoder in (four, one)
    )
    assert ours["backbone"] == theirs["backbone"]
    assert {name for name in ours if ours[name] != theirs[name]} == {"heads"}


def test_a_checkpoint_is_of_one_held_out_set(data: str, photographs: Path, tmp_path: Path) -> None:
    prepare(str(photographs / "cat"), str(tmp_path / "cats"))
    backbone = Backbone(build_encoder(TINY), TINY, None)
    ours, theirs = (
        facts_of(backbone, data, holdout, tmp_path) for holdout in (data, str(tmp_path / "cats"))
    )
    assert {name for name in ours if ours[name] != theirs[name]} == {"holdout"}


@pytest.mark.usefixtures("one_rank")
def test_one_that_another_driver_has_taken_over_saves_nothing(data: str, tmp_path: Path) -> None:
    run = FinetuneRun(storage=str(tmp_path))
    whole = Recipe(model=TINY, optim=RECIPE.optim, data=run.data(data, data), run=run.run)
    home = open_place(whole.home)
    job = Job(whole, plan(whole), Events(None), claim_for_driver(home), {})
    tuning = Tuning(finetune=RECIPE, classes=["c"] * 6, facts={}, held=[])
    cpu = torch.device("cpu")
    model = build_classifier(build_encoder(TINY).state_dict(), TINY, 6, RECIPE)
    state = FinetuneState.create(
        RECIPE, model, 6, compute=run.compute, steps_per_epoch=6, device=cpu
    )
    attempt = claim_for_group(home, job.driver, cpu)
    claim_for_driver(home)
    proof = Proof.begin(attempt, job.schedule, 0, 0, cpu)
    keeper = Keeper(job, cpu, proof, None)
    _save(tuning, job, state, keeper)
    with pytest.raises(SupersededError, match="was taken over by process"):
        keeper.finish()
    keeper.close()
    assert checkpoints.newest(home) is None


def test_one_whose_checkpoints_are_gone_does_not_begin_again(tmp_path: Path) -> None:
    whole = Recipe(run=FinetuneRun(storage=str(tmp_path)).run)
    home = open_place(whole.home)
    for step in (1, 2):
        stored_state.save(home, step, {"w": torch.ones(3)}, {}, checkpoints.Retention(9))
    (home / checkpoints.FOLDER).delete()
    with pytest.raises(ConfigError, match=r"had a checkpoint at step 2.*choose another --name"):
        _check_resume(whole, None, {}, resume=True)


def test_a_checkpoint_of_a_fine_tuning_says_why_it_is_no_backbone(tmp_path: Path) -> None:
    home = open_place(str(tmp_path))
    facts, state = {"finetune": {}}, {"w": torch.ones(3)}
    saved = stored_state.save(home, 6, state, facts, checkpoints.Retention(1))
    for refuse in (from_checkpoint, receipt.make, run_report, schedule_of):
        with pytest.raises(DataError, match=r"a fine-tuned classifier, .*finetune\.backbone"):
            refuse(saved)
    with pytest.raises(DataError, match="does not name its classes: an older droppos made it"):
        export_checkpoint(saved.uri, str(tmp_path / "out"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(backbone: str, data: str, folder: Path, ray_cluster: None) -> Finetuned:
    """A run of three epochs of six steps, from its first step to its last."""
    return tune(backbone, data, folder)


@pytest.mark.slow
def test_a_backbone_learns_and_is_asked_and_mlflow_knows(
    whole: Finetuned, backbone: str, data: str, folder: Path
) -> None:
    from mlflow.tracking import MlflowClient

    assert whole.step == whole.steps == 18
    assert whole.top_1 is not None and whole.top_1.total == 72
    assert whole.top_5 is not None and whole.top_5.hits >= whole.top_1.hits
    assert whole.top_1.interval[0] > 1 / 6  # more than a guess, of pictures it has learnt
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    run = client.get_run(whole.tracking_run)
    assert run.data.metrics["finetune/accuracy"] == whole.top_1.value
    assert run.data.metrics["finetune/accuracy_low_95"] == whole.top_1.interval[0]
    assert run.data.metrics[HOURS] > 0 and run.data.tags["hardware.workers"]
    losses = client.get_metric_history(whole.tracking_run, "train/loss")
    assert [point.step for point in losses] == list(range(1, 19))
    assert run.data.tags["hardware.nodes"] == "1"
    # Storage knows it, too, and each checkpoint which one was before it.
    kept = history.curves(open_place(whole.home), whole.steps)
    assert kept["train/loss"] == [(point.step, point.value) for point in losses]
    assert kept["finetune/accuracy"] == [(18, whole.top_1.value)]
    newest = checkpoints.newest(open_place(whole.home))
    assert newest is not None and newest.cursor["step"] == 18
    assert newest.record["previous"]["step"] == 12

    with pytest.raises(ConfigError, match="--resume"):
        tune(backbone, data, folder)
    with pytest.raises(ConfigError, match=r"layer_decay: 0\.75 in the checkpoint, 0\.5 now"):
        tune(backbone, data, folder, replace(RECIPE, layer_decay=0.5), resume=True)


@pytest.mark.slow
def test_what_it_made_is_exported_and_classifies_as_it_was_counted(
    whole: Finetuned, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "classifier"
    report = export_checkpoint(whole.home, str(out))
    assert report.classes == 6
    model: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    place = open_place(data)
    manifest = load_manifest(place)
    assert model.pretrained_cfg["label_names"] == list(manifest.classes)
    hits = 0
    for piece in pieces_of(choose(manifest)):
        with ThreadPoolExecutor(1) as threads:
            rows, pixels = decode(place, manifest, piece, TINY.image_size, threads)
        with torch.no_grad():
            found = model(normalise(pixels)).argmax(1).tolist()
        hits += sum(row.label == each for row, each in zip(rows, found, strict=True))
    assert whole.top_1 is not None and hits == whole.top_1.hits
    with pytest.raises(ConfigError, match="transformers has no words; expected --format timm or"):
        export_checkpoint(whole.home, str(tmp_path / "other"), "transformers")


@pytest.mark.long
def test_one_that_is_stopped_and_loses_a_worker_ends_where_the_whole_one_did(
    backbone: str, data: str, tmp_path: Path, ray_cluster: None
) -> None:
    pids: dict[int, int] = {}
    told: list[str] = []

    def stop_in_an_epoch(event: Mapping[str, Any]) -> None:
        if event["kind"] == "metrics" and event["step"] == 20:
            signal.raise_signal(signal.SIGTERM)

    def kill_one(event: Mapping[str, Any]) -> None:
        told.append(event["kind"])
        if event["kind"] == "started":
            pids[event["rank"]] = event["pid"]
        if event["kind"] == "checkpoint" and "lost" not in told:
            os.kill(pids[1], signal.SIGKILL)

    longer = replace(RECIPE, optim=replace(RECIPE.optim, epochs=60))
    whole = tune(backbone, data, tmp_path / "whole", longer)
    first = tune(backbone, data, tmp_path, longer, on_event=stop_in_an_epoch)
    assert not first.finished and 20 < first.step < 360
    again = tune(backbone, data, tmp_path, longer, min_workers=1, resume=True, on_event=kill_one)
    assert "lost" in told and again.tracking_run == first.tracking_run
    ends = [checkpoints.newest(open_place(run.home)) for run in (whole, again)]
    assert all(saved is not None and saved.step == 360 for saved in ends)
    ours, theirs = (stored_state.load_full(saved, {"model"})["model"] for saved in ends if saved)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    assert whole.finished and (again.top_1, again.top_5) == (whole.top_1, whole.top_5)


@pytest.mark.long
def test_one_that_diverges_is_not_tried_again(backbone: str, data: str, tmp_path: Path) -> None:
    told: list[str] = []
    hot = replace(RECIPE, optim=replace(RECIPE.optim, lr_per_256=1e30, warmup_epochs=0))
    with pytest.raises(DivergedError, match="the fine-tuning diverged"):
        tune(backbone, data, tmp_path, hot, on_event=lambda event: told.append(event["kind"]))
    assert told.count("group") == 1
