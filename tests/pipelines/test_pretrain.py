"""The main job on a real Ray, a real S3 server and a real MLflow: whole, stopped, on bad data."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from droppos.config import Compute, Method, Optim
from droppos.errors import ConfigError, DataError
from pipelines import checkpoints, receipt
from pipelines.evaluate import evaluate
from pipelines.export import export_checkpoint
from pipelines.history import curves
from pipelines.holdout import measure_checkpoint
from pipelines.local_s3 import S3Server
from pipelines.prepare import prepare
from pipelines.pretrain import Outcome, pretrain
from pipelines.receipt_check import verify
from pipelines.recipe import Data, Measure, Recipe, Run, Tracking
from pipelines.shards import load_manifest
from pipelines.storage import open_place
from tests.droppos.tiny import TINY

pytestmark = [
    pytest.mark.slow,
    # Notices of Ray, MLflow and SQLAlchemy about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS = 24
"""72 pictures in batches of 12, for 4 epochs."""


@pytest.fixture(scope="module")
def bucket(s3: S3Server, photographs: Path) -> str:
    """A bucket with the photographs as a prepared data set, put there over HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.env.items():
            patch.setenv(name, value)
        bucket = s3.bucket("pretrain")
        report = prepare(str(photographs), f"{bucket}/data", group_rows=10)
    assert report.pictures == 72
    return bucket


@pytest.fixture
def recipe(bucket: str, s3_env: S3Server, ray_cluster: None, tmp_path: Path) -> Recipe:
    return Recipe(
        model=TINY,
        method=Method(mask_ratio=0.25),
        optim=Optim(epochs=4, global_batch=12, warmup_epochs=1, lr_per_256=2e-2),
        compute=Compute(strategy="fsdp2", precision="float32", device="cpu"),
        data=Data(path=f"{bucket}/data", holdout=f"{bucket}/data", window=24, decode_cpus=2),
        run=Run(
            name="whole",
            storage=f"{bucket}/runs",
            workers=2,
            log_every=1,
            checkpoint_every=8,
            keep_checkpoints=2,
        ),
        measure=Measure(every_epochs=2, mask_ratio=0.25, pictures=20),
        tracking=Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", price_per_worker_hour=2),
    )


def history(recipe: Recipe, outcome: Outcome, metric: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=recipe.tracking.uri)
    found = client.get_metric_history(outcome.tracking_run, metric)
    return sorted((point.step, point.value) for point in found)


def named(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    return replace(recipe, run=replace(recipe.run, name=name, **changes))


def test_from_pictures_to_a_backbone_over_s3(recipe: Recipe, tmp_path: Path, bucket: str) -> None:
    outcome = pretrain(recipe)

    assert outcome.finished and outcome.steps == STEPS
    home = open_place(recipe.home)
    assert (home / "checkpoints").children() == ["step-00000016", "step-00000024"]
    assert [step for step, _ in history(recipe, outcome, "train/loss")] == list(range(1, STEPS + 1))
    assert [step for step, _ in history(recipe, outcome, "holdout/position/accuracy")] == [12, 24]
    assert [step for step, _ in history(recipe, outcome, "holdout/features/knn_skill")] == [12, 24]
    saved = checkpoints.newest(home)
    assert saved is not None
    held_out = {name: v for name, v in outcome.metrics.items() if name.startswith("holdout/")}
    assert measure_checkpoint(recipe, saved) == pytest.approx(held_out, rel=1e-5)
    assert {path.name for path in outcome.pictures} == {
        "reassembly.png", "confusion.png", "curves.png", "attention.png", "features.png"
    }  # fmt: skip
    assert not any((tmp_path / "mlruns").glob("*"))
    assert curves(home, STEPS)["train/loss"] == history(recipe, outcome, "train/loss")
    recorded = MlflowClient(tracking_uri=recipe.tracking.uri).get_run(outcome.tracking_run).data
    assert recorded.tags["hardware.workers"].startswith("2 x ")
    assert float(recorded.tags["hardware.cpus"]) > 0
    assert "command" in recorded.tags
    assert 0 < recorded.metrics["system/cpu_percent"] <= 100
    assert recorded.metrics["cost/price"] == 2 * recorded.metrics["cost/worker_hours"] > 0

    report = export_checkpoint(recipe.home, str(tmp_path / "backbone"))
    assert report.largest_difference <= 1e-5
    measured = evaluate(str(report.path), f"{bucket}/data", measure=recipe.measure)
    assert measured.knn is not None and measured.probe is not None
    assert measured.position is not None
    assert measured.position.accuracy.value == pytest.approx(
        outcome.metrics["holdout/position/accuracy"], abs=1e-6
    )
    plain = (
        "import sys, timm; model = timm.create_model(sys.argv[1], pretrained=True); "
        "assert 'droppos' not in sys.modules; print(model.num_features)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", plain, f"local-dir:{report.path}"], capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "48"
    made, notes = receipt.make(saved, str(report.path))
    assert not notes and [link["step"] for link in made["chain"]] == [8, 16, 24]
    assert made["mlflow"]["run_id"] == outcome.tracking_run
    checks = verify(made, backbone=str(report.path))
    assert {check.state for check in checks} <= {"ok", "note"}, checks

    with pytest.raises(ConfigError, match="--resume"):
        pretrain(recipe)


def test_the_demo_stopped_by_ctrl_c_names_its_checkpoint_and_goes_on(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "pipelines.cli", "demo"),
        *("--run.storage", str(tmp_path / "demo"), "--run.log-every", "1"),
        *("--optim.epochs", "1", "--optim.warmup-epochs", "0.1"),
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    said = ""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as first:
        assert first.stdout is not None
        for line in first.stdout:
            said += line
            if "loss" in line:
                # As a terminal does: all of Ray's processes hear it, too.
                os.killpg(first.pid, signal.SIGINT)
                break
        said += first.stdout.read()
    assert first.returncode == 130, said
    assert "Traceback" not in said
    assert "stopped at step" in said and "checkpoint" in said and "--resume" in said

    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for words in ("placed right", "chance", "backbone", "reassembly.png", "mlflow ui"):
        assert words in done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    home = tmp_path / "demo" / "demo"
    made, _ = receipt.make(checkpoints.at(str(home)), str(home / "backbone"))
    assert made["chain"][0]["previous"] is None and len(made["chain"]) > 1
    assert ["--resume" in code["command"] for code in made["code"]] == [False, True]


@pytest.fixture(scope="module")
def damaged(bucket: str, s3: S3Server, photographs: Path) -> str:
    """The photographs in small shards over S3: one gone, one cut off, one with a changed byte."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.env.items():
            patch.setenv(name, value)
        prepare(str(photographs), f"{bucket}/damaged", shard_bytes=60_000, group_rows=4)
        place = open_place(f"{bucket}/damaged")
        (place / "shard-00001.parquet").delete()
        cut, changed = place / "shard-00003.parquet", place / "shard-00005.parquet"
        cut.write_bytes(cut.read_bytes()[:-2000])
        data = bytearray(changed.read_bytes())
        data[1000] ^= 255
        changed.write_bytes(bytes(data))
    return str(place)


def test_damaged_shards_cost_their_pictures_and_too_many_end_the_run_which_goes_on(
    recipe: Recipe, damaged: str
) -> None:
    data = replace(recipe.data, path=damaged, holdout=None, skip_limit=0.05)
    recipe = replace(named(recipe, "damaged", checkpoint_every=1000), data=data)
    with pytest.raises(DataError, match=r"of 72 pictures could not be had.*skip_limit 0\.05"):
        pretrain(recipe)
    saved = checkpoints.newest(open_place(recipe.home))
    assert saved is not None and 0 < saved.step <= STEPS

    patient = replace(recipe, data=replace(data, skip_limit=0.6))  # the way out it names
    outcome = pretrain(patient, resume=True)
    assert outcome.finished
    shards = load_manifest(open_place(damaged)).shards
    starts = [sum(shard.rows for shard in shards[:i]) for i in range(len(shards))]
    gone = {row for i in (1, 3) for row in range(starts[i], starts[i] + shards[i].rows)}
    group = set(range(starts[5], starts[5] + shards[5].row_groups[0]))
    listed = (open_place(recipe.home) / "skipped.jsonl").read_bytes().decode().splitlines()
    problems = {entry["row"]: entry["problem"] for entry in map(json.loads, listed)}
    assert set(problems) == gone | group  # four epochs of six batches see every picture
    assert "no such object" in problems[starts[1]]
    assert "bytes" in problems[starts[3]]
    assert "checksum" in problems[starts[5]].lower()
    skipped = history(recipe, outcome, "data/pictures_skipped")
    since = [count for step, count in skipped if step > saved.step]  # a driver counts anew
    assert since == sorted(since) and since[-1] == len(problems)
    assert max(value for _, value in history(recipe, outcome, "data/pictures_replaced")) > 0
