"""Exactly once, whatever happens to a driver: runs taken over and resumed on a real Ray over S3.

Each run records which picture it trained on in which step. What an interrupted run has committed
in the end must be, record by record, what the uninterrupted one has. What happens to workers,
nodes and storage is test_drill.py's.

Also a program, a driver that can be killed; it prints its events, one a line:
`python test_exactness.py drive RECIPE ADDRESS [--resume] [--allow-changes]`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from droppos.config import Compute, Method, Model, Optim
from droppos.errors import ConfigError
from pipelines import checkpoints
from pipelines.audit import audit
from pipelines.ids import id_files, read_ids
from pipelines.local_s3 import S3Server
from pipelines.news import told
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.recipe import Data, Recipe, Run, Tracking
from pipelines.recipe_file import from_dict, read, to_yaml
from pipelines.storage import open_place

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    # Notices of Ray, MLflow and SQLAlchemy about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EPOCHS, STEPS = 12, 48
"""72 pictures in batches of 16: four steps an epoch, and 8 pictures that it leaves out."""

OnStep = Callable[["Heard"], None]


@dataclass
class Heard:
    """What a run said, and what to do once it is some steps further than where it started."""

    after: int | None = None
    do: OnStep | None = None
    losses: dict[int, float] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    news: str = ""

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.news += told(event) or ""
        if event["kind"] == "started":
            self.pids[event["rank"]] = event["pid"]
            if event["rank"] == 0:
                self.starts.append(event["step"])
        if event["kind"] == "metrics" and "train/loss" in event["values"]:
            self.losses[event["step"]] = event["values"]["train/loss"]
            if self.do and self.after and event["step"] >= self.starts[0] + self.after:
                do, self.do = self.do, None
                do(self)


@pytest.fixture(scope="module")
def s3_all_along(s3: S3Server) -> Iterator[S3Server]:
    """The server, for fixtures that outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.env.items():
            patch.setenv(name, value)
        yield s3


@pytest.fixture(scope="module")
def recipe(
    s3_all_along: S3Server, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recipe:
    bucket = s3_all_along.bucket("exactness")
    prepare(str(photographs), f"{bucket}/data", group_rows=10)
    database = tmp_path_factory.mktemp("exactness") / "mlflow.db"
    return Recipe(
        model=Model(
            size="tiny",
            image_size=(32, 48),
            patch_size=8,
            width=48,
            depth=1,
            heads=4,
            decoder_width=32,
            decoder_heads=4,
        ),
        method=Method(mask_ratio=0.25),
        optim=Optim(epochs=EPOCHS, global_batch=16, warmup_epochs=1, lr_per_256=2e-2),
        compute=Compute(strategy="fsdp2", precision="float32", device="cpu"),
        data=Data(path=f"{bucket}/data", window=32, decode_cpus=1),
        run=Run(
            name="whole",
            storage=f"{bucket}/runs",
            workers=2,
            log_every=1,
            checkpoint_every=3,
            keep_checkpoints=2,
            record_ids=True,
        ),
        tracking=Tracking(uri=f"sqlite:///{database}"),
    )


@dataclass(frozen=True)
class Reference:
    """The run that nothing disturbs."""

    losses: dict[int, float]
    records: np.ndarray


@pytest.fixture(scope="module")
def whole(recipe: Recipe, ray_cluster: None) -> Reference:
    heard = Heard()
    assert pretrain(recipe, on_event=heard).finished
    return Reference(heard.losses, committed(recipe))


def named(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    return replace(recipe, run=replace(recipe.run, name=name, **changes))


def committed(recipe: Recipe) -> np.ndarray:
    """Sorted (step, epoch, row) of all that a run's newest checkpoint is made of."""
    home = open_place(recipe.home)
    saved = checkpoints.newest(home)
    assert saved is not None
    tables = [read_ids(file) for file in id_files(home) if file.end <= saved.step]
    records = np.concatenate([np.stack([c.to_numpy() for c in t.columns], 1) for t in tables])
    return records[np.lexsort(records.T[::-1])]


def assert_exact(recipe: Recipe, whole: Reference) -> None:
    """What is committed equals the reference, the audit agrees, and so does plain counting."""
    records = committed(recipe)
    np.testing.assert_array_equal(records, whole.records)
    found = audit(recipe.home)
    assert found.is_exact and found.step == STEPS
    for epoch in range(EPOCHS):
        rows, times = np.unique(records[records[:, 1] == epoch, 2], return_counts=True)
        assert len(rows) == 64 and (times == 1).all() and rows.min() >= 0 and rows.max() < 72
    left_out = [set(range(72)) - set(records[records[:, 1] == e, 2].tolist()) for e in range(2)]
    assert left_out[0] != left_out[1]
    files = id_files(open_place(recipe.home))
    assert all(file.end <= STEPS for file in files)


@contextmanager
def driver(recipe: Recipe, folder: Path, *flags: str) -> Iterator["subprocess.Popen[str]"]:
    """A driver in a process of its own, on the tests' cluster."""
    file = folder / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    address = ray.get_runtime_context().gcs_address
    root = Path(__file__).parents[2]
    with (folder / "driver.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "drive", str(file), address, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "RAY_AUTH_MODE": "disabled"},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def listen(process: "subprocess.Popen[str]", heard: Heard) -> None:
    """Hear a driver out, or until it is killed by what is heard."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            heard(json.loads(line))


def test_the_reference_is_exact(recipe: Recipe, whole: Reference) -> None:
    assert_exact(recipe, whole)
    saved = checkpoints.newest(open_place(recipe.home))
    assert saved is not None
    assert saved.cursor == {"epoch": EPOCHS, "batch": 0, "step": STEPS, "pictures": 0}


def test_another_driver_takes_a_run_over_to_the_last_bit_and_the_first_gives_up(
    recipe: Recipe, whole: Reference, photographs: Path, tmp_path: Path
) -> None:
    """The first's workers are frozen and thawed, as on a node that the network cut off."""
    recipe = named(recipe, "two-drivers", checkpoint_every=8)

    def freeze(heard: Heard) -> None:
        for pid in heard.pids.values():
            os.kill(pid, signal.SIGSTOP)

    with driver(recipe, tmp_path) as process:
        older = Heard(12, freeze)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                older(json.loads(line))
            if older.do is None:
                break
        for changed, words in (
            (replace(recipe, run=replace(recipe.run, seed=1)), "run.seed: 0 in the checkpoint, 1"),
            (replace(recipe, optim=replace(recipe.optim, global_batch=8)), "global_batch: 16"),
            (with_other_picture(recipe, photographs, tmp_path), "content: pictures, their names"),
        ):
            with pytest.raises(ConfigError, match=words):
                pretrain(changed, resume=True)
        newer = Heard()
        assert pretrain(recipe, resume=True, on_event=newer).finished
        for pid in older.pids.values():
            os.kill(pid, signal.SIGCONT)
        listen(process, older)
        assert process.wait() == 1
    assert "was taken over by process" in (tmp_path / "driver.log").read_text()
    assert newer.starts == [8]
    assert older.losses | newer.losses == whole.losses  # to the last bit
    assert_exact(recipe, whole)


def test_batches_that_spoil_the_gradient_are_passed_over_and_their_pictures_named(
    recipe: Recipe, whole: Reference, poison: Path
) -> None:
    """Three bad steps, two are allowed: back to the checkpoint before them, on without them."""
    recipe = named(recipe, "poisoned", bad_steps=2, max_rewinds=1, checkpoint_every=6)
    heard = Heard()
    poison.write_text("9,10,11")
    try:
        assert pretrain(recipe, on_event=heard).finished
    finally:
        poison.unlink()
    assert heard.starts == [0, 6]
    assert set(range(1, STEPS + 1)) - set(heard.losses) == {10, 11, 12}
    assert [heard.losses[step] for step in range(1, 10)] == [
        whole.losses[step] for step in range(1, 10)
    ]
    record = json.loads((open_place(recipe.home) / "passed_over.json").read_bytes())
    assert record["rewinds"] == 1 and set(record["pictures"]) == {"9", "10", "11"}
    assert all(len(keys) == 16 for keys in record["pictures"].values())
    assert "not finite" in heard.news
    assert_exact(recipe, whole)  # they were taken, and nothing else was in their place


def test_changes_that_are_allowed_go_on_and_a_driver_killed_with_9_takes_its_workers_along(
    recipe: Recipe, whole: Reference, photographs: Path, tmp_path: Path
) -> None:
    other = with_other_picture(recipe, photographs, tmp_path)
    other = replace(other, optim=replace(other.optim, epochs=EPOCHS + 1))
    with driver(other, tmp_path, "--resume", "--allow-changes") as process:
        heard = Heard(1, lambda _: process.kill())
        listen(process, heard)
    assert heard.starts == [STEPS] and min(heard.losses) == STEPS + 1
    workers = [psutil.Process(pid) for pid in heard.pids.values() if psutil.pid_exists(pid)]
    # Ray ends them: nothing may go on writing this run on a cluster that outlives its driver.
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def with_other_picture(recipe: Recipe, photographs: Path, folder: Path) -> Recipe:
    """The same run on data in which one picture is another."""
    bucket = recipe.run.storage.removesuffix("/runs")
    source = folder / "other"
    if not source.exists():
        for picture in photographs.glob("*/*.jpg"):
            target = source / picture.relative_to(photographs)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(picture.read_bytes())
        (source / "cat/03.jpg").write_bytes((photographs / "cat/04.jpg").read_bytes())
    prepare(str(source), f"{bucket}/other-{folder.name}", group_rows=10)
    return replace(recipe, data=replace(recipe.data, path=f"{bucket}/other-{folder.name}"))


def drive(file: str, cluster: str, *flags: str) -> None:
    """Be a driver that prints what it hears."""
    names = ("AWS_", "OMP_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name.startswith(names)}
    ray.init(
        address=cluster, log_to_driver=False, logging_level="error", runtime_env={"env_vars": env}
    )

    def on_event(event: Mapping[str, Any]) -> None:
        if event["kind"] in {"started", "metrics"}:
            print(json.dumps(event), flush=True)

    pretrain(
        from_dict(read(file)),
        resume="--resume" in flags,
        allow_changes="--allow-changes" in flags,
        on_event=on_event,
    )


if __name__ == "__main__":
    {"drive": drive}[sys.argv[1]](*sys.argv[2:])
