import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import pytest
import requests
import torch
from mlflow.tracking import MlflowClient

from droppos.errors import ConfigError
from pipelines import checkpoints, stored_state
from pipelines.ledger import Ledger
from pipelines.local_mlflow import free_port, mlflow_server
from pipelines.recipe import Data, Recipe, Run, Tracking
from pipelines.secrets import redact
from pipelines.storage import open_place
from pipelines.tracking import local_folder, open_command, tracking_uri

# MLflow's own mapping of its tables uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the database is. One for all tests: making its tables takes three seconds."""
    return tmp_path_factory.mktemp("a folder")


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def ledger(uri: str, tmp_path: Path, **options: Any) -> Ledger:
    home = str(options.pop("home", tmp_path / "run"))
    return Ledger(uri, "tests", "a run", home, tmp_path / "spool", **options)


def history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    values = MlflowClient(uri).get_metric_history(run_id, metric)
    return sorted((value.step, value.value) for value in values)


def test_a_run_is_recorded_and_ends_as_its_block_ends(uri: str, tmp_path: Path) -> None:
    with ledger(uri, tmp_path) as ours:
        ours.describe(Recipe(), {"data.manifest": "abc"})
        for step in range(2500):
            ours.log(step, {"train/loss_nats": 1 / (step + 1)})
    run = MlflowClient(uri).get_run(ours.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["method.mask_ratio"] == "0.75"
    assert run.data.params["model.image_size"] == "[224, 224]"
    assert run.data.tags["data.manifest"] == "abc"
    assert history(uri, ours.run_id, "train/loss_nats") == [(i, 1 / (i + 1)) for i in range(2500)]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_an_exception_is_the_status_and_goes_on(
    uri: str, tmp_path: Path, error: type[BaseException], status: str
) -> None:
    ours = ledger(uri, tmp_path)
    with pytest.raises(error), ours:
        raise error
    assert MlflowClient(uri).get_run(ours.run_id).info.status == status


def test_a_resumed_run_goes_on_with_no_step_twice(uri: str, tmp_path: Path) -> None:
    with ledger(uri, tmp_path) as first:
        for step in range(10):
            first.log(step, {"loss": step})
            first.log(step, {"loss": -1})  # the workers started again
    with ledger(uri, tmp_path, home=tmp_path / "another") as another:
        another.log(0, {"loss": 0})
    with ledger(uri, tmp_path, resume=True) as second:
        assert second.last_step("loss") == 9
        for step in range(5, 15):
            second.log(step, {"loss": step, "late": step})
    assert second.run_id == first.run_id != another.run_id
    assert history(uri, first.run_id, "loss") == [(step, step) for step in range(15)]
    assert history(uri, first.run_id, "late") == [(step, step) for step in range(5, 15)]


def test_what_a_resume_changed_is_a_tag(uri: str, tmp_path: Path) -> None:
    with ledger(uri, tmp_path) as ours:
        ours.describe(Recipe(), {})
    with ledger(uri, tmp_path, resume=True) as ours:
        ours.describe(Recipe(run=Run(workers=2)), {})
    data = MlflowClient(uri).get_run(ours.run_id).data
    assert data.params["run.workers"] == "1"
    assert data.tags["changed.run.workers"] == "2"
    assert [tag for tag in data.tags if tag.startswith("changed.")] == ["changed.run.workers"]


def test_no_secret_reaches_the_database(uri: str, folder: Path, tmp_path: Path) -> None:
    secret = "hunter2"
    recipe = Recipe(
        data=Data(path=f"s3://me:{secret}@bucket/photos?access_key={secret}&x=1"),
        tracking=Tracking(uri=f"https://mlflow.example/?token={secret}"),
    )
    home = f"{tmp_path}/run?token={secret}"
    with ledger(uri, tmp_path, home=home) as ours:
        ours.describe(recipe, {"from": f"https://h/?X-Amz-Signature={secret}"})
    for file in folder.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes()
    params = MlflowClient(uri).get_run(ours.run_id).data.params
    assert params["data.path"] == "s3://***@bucket/photos?access_key=***&x=1"
    with ledger(uri, tmp_path, home=home, resume=True) as again:
        assert again.run_id == ours.run_id


@pytest.mark.parametrize("text", ["s3://bucket/a@b.jpg", "no uri: a@b", "http://h/?page=2"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_long_values_are_cut_with_a_mark(uri: str, tmp_path: Path) -> None:
    with ledger(uri, tmp_path) as ours:
        ours.describe(Recipe(data=Data(path="x" * 9000)), {"long": "y" * 9000})
    data = MlflowClient(uri).get_run(ours.run_id).data
    assert data.params["data.path"].endswith("x …[9000 characters]")
    assert data.tags["long"].endswith("y …[9000 characters]")


def test_pictures_and_checkpoints_lie_beside_the_database(
    uri: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "x.png").write_bytes(b"png")
    home = open_place(str(tmp_path / "run"))
    saved = stored_state.save(
        home, 7, {"model": {"w": torch.ones(2)}}, {}, checkpoints.Retention(1)
    )
    with ledger(uri, tmp_path) as ours:
        ours.picture(tmp_path / "x.png", "pictures/reassembly.png")
        ours.checkpoint(saved)
    kept = folder / "mlflow-artifacts" / ours.run_id / "artifacts"
    assert (kept / "pictures/reassembly.png").read_bytes() == b"png"
    pointer = json.loads((kept / "checkpoints/step-00000007.json").read_text())
    expected = {"uri": saved.uri, "step": 7, "bytes": saved.size, "complete_sha256": saved.sha256}
    assert pointer == expected
    assert MlflowClient(uri).get_run(ours.run_id).data.tags["droppos.checkpoint.uri"] == saved.uri
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_picture_that_is_gone_ends_nothing(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger(uri, tmp_path) as ours:
        ours.picture(tmp_path / "gone.png", "gone.png")
        ours.log(1, {"loss": 1})
    assert history(uri, ours.run_id, "loss") == [(1, 1)]
    assert "gone.png cannot be read" in caplog.text


def test_nothing_is_said_when_the_database_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ledger(f"sqlite:///{tmp_path}/new/mlflow.db", tmp_path):
        pass
    assert capfd.readouterr() == ("", "")


def test_mlflow_is_where_the_recipe_says_or_the_environment_or_the_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = Recipe(run=Run(storage="runs"))
    away = Recipe(run=Run(storage="s3://bucket/runs"))
    assert tracking_uri(here) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri(away) == f"sqlite:///{tmp_path}/droppos-runs/mlflow.db"
    assert local_folder(Recipe(run=Run(storage="file:///a%20b"))) == Path("/a b")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(here) == "http://mlflow:5000"
    assert tracking_uri(Recipe(tracking=Tracking(uri="sqlite:///x"))) == "sqlite:///x"


def test_a_person_is_told_what_to_type() -> None:
    command = open_command("sqlite:////a b/mlflow.db")
    assert command.endswith("mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'")
    assert Path(command.split()[0]).is_file()
    assert open_command("https://me:hunter2@mlflow.example") == "https://***@mlflow.example"


def test_asking_for_the_ledger_does_not_import_mlflow() -> None:
    probe = "import sys, pipelines.ledger; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


class NotMlflow(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def another_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), NotMlflow)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def no_server() -> Iterator[str]:
    yield f"http://me:hunter2@127.0.0.1:{free_port()}"


@contextmanager
def no_store() -> Iterator[str]:
    yield "./mlruns"


@pytest.mark.parametrize("where", [another_server, silent_server, no_server, no_store])
def test_an_mlflow_that_is_none_is_an_error_soon(where: Any, tmp_path: Path) -> None:
    start = time.monotonic()
    with (
        where() as uri,
        pytest.raises(ConfigError, match=r"cannot be used: .*tracking.uri") as info,
    ):
        ledger(uri, tmp_path).__enter__()
    assert time.monotonic() - start < 15
    assert "hunter2" not in str(info.value)


@pytest.mark.slow
def test_a_server_that_stops_in_mid_run_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on; what was logged meanwhile is spooled, and the run goes on later."""
    caplog.set_level(logging.WARNING)
    send, senders = requests.Session.send, list[str]()

    def noted(*args: Any, **options: Any) -> requests.Response:
        senders.append(current_thread().name)
        return send(*args, **options)

    def log(ours: Ledger, steps: range) -> None:
        for step in steps:
            ours.log(step, {"loss": step, "images_per_s": 1.0})
            time.sleep(0.001)

    port = free_port()
    with mlflow_server(tmp_path / "server", port) as uri:
        ours = ledger(uri, tmp_path, patience_s=3)
        ours.__enter__()
        monkeypatch.setattr(requests.Session, "send", noted)
        log(ours, range(50))
        time.sleep(3)
    log(ours, range(50, 2000))
    ours.picture(Path(__file__), "test.py")
    ours.__exit__(None, None, None)
    # Who logs asks nothing of a server, so no server can hold it up.
    assert set(senders) == {"ledger"}
    monkeypatch.undo()
    assert "did not reach MLflow" in caplog.text
    lines = (tmp_path / "spool" / f"{ours.run_id}.jsonl").read_text().splitlines()
    spooled = [json.loads(line) for line in lines]
    assert [e["step"] for e in spooled if e.get("metric") == "loss"] == list(range(50, 2000))
    assert [e["kind"] for e in spooled[-2:]] == ["File", "Ended"]

    with mlflow_server(tmp_path / "server", port) as uri:
        with ledger(uri, tmp_path, resume=True) as again:
            assert again.run_id == ours.run_id
            assert again.last_step == 49
            log(again, range(40, 60))
        assert history(uri, ours.run_id, "loss") == [(step, step) for step in range(60)]
        assert MlflowClient(uri).get_run(ours.run_id).info.status == "FINISHED"
