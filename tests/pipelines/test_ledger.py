import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import pytest
import requests
import torch
from mlflow.tracking import MlflowClient

from droppos.errors import ConfigError, DataError
from pipelines import checkpoints, outbox, stored_state
from pipelines.groundwork import located
from pipelines.history import HistoryWriter
from pipelines.journal import About, Artifact, Ended, Journal, Row, journals
from pipelines.ledger import HOME, Ledger, begin_anew
from pipelines.local_mlflow import LocalMlflow, free_port
from pipelines.recipe import Data, Recipe, Run, Tracking
from pipelines.secrets import redact
from pipelines.storage import open_place
from pipelines.sync import sync
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
def test_an_mlflow_that_is_none_is_an_error_soon(
    where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")  # which is 10 when nobody says
    start = time.monotonic()
    with (
        where() as uri,
        pytest.raises(ConfigError, match=r"cannot be used: .*tracking.uri") as info,
    ):
        ledger(uri, tmp_path).__enter__()
    assert time.monotonic() - start < 8  # MLflow's own tries would take minutes
    assert "hunter2" not in str(info.value)


def test_the_newest_process_writes_and_an_older_one_sends_no_more(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second driver takes the run over; what the first one still says is not doubled."""
    monkeypatch.setattr(outbox, "LOOK_S", 0.2)
    monkeypatch.setattr(outbox, "SETTLE_S", 1.0)
    older = ledger(uri, tmp_path)
    older.__enter__()
    for step in range(5):
        older.log(step, {"loss": step})
    wait_for(lambda: history(uri, older.run_id, "loss") == [(i, i) for i in range(5)])
    with ledger(uri, tmp_path, resume=True) as newer:
        assert newer.run_id == older.run_id
        time.sleep(1.5)  # the older one has time to look, when it next has something to send
        for step in range(5, 20):
            older.log(step, {"loss": -step})
            newer.log(step, {"loss": step})
        older.finish("FAILED")
        assert "another process has taken the run over" in caplog.text
        assert MlflowClient(uri).get_run(newer.run_id).info.status == "RUNNING"
        synced, living = sorted(sync(str(tmp_path)), key=lambda one: one.living)
        assert synced.sent == 0 < synced.overtaken
        assert living.living
    assert history(uri, newer.run_id, "loss") == [(step, step) for step in range(20)]
    assert MlflowClient(uri).get_run(newer.run_id).info.status == "FINISHED"
    (synced,) = sync(str(tmp_path))  # MLflow has all of it by now
    assert (synced.left, synced.overtaken) == (0, 0)
    assert sync(str(tmp_path)) == []
    assert history(uri, newer.run_id, "loss") == [(step, step) for step in range(20)]
    assert MlflowClient(uri).get_run(newer.run_id).info.status == "FINISHED"


def test_a_resumed_run_takes_over_what_a_killed_one_left(uri: str, tmp_path: Path) -> None:
    with ledger(uri, tmp_path) as first:
        first.log(0, {"loss": 0})
    left = Journal.create(
        tmp_path / "spool", About(uri, first.run_id, "a run", first.home, "000002-abc")
    )
    for step in range(1, 5):
        left.append(Row(step, 1000 + step, {"loss": step}))
    left.append(Artifact("note.txt", b"hello"))
    left.append(Ended("KILLED", 5000))
    left._file.close()  # as when its process is killed
    with ledger(uri, tmp_path, resume=True) as second:
        assert second.last_step("loss") == 4
        for step in range(3, 8):  # from the checkpoint of step 3 on
            second.log(step, {"loss": step})
    run = MlflowClient(uri).get_run(first.run_id)
    assert history(uri, first.run_id, "loss") == [(step, step) for step in range(8)]
    assert run.info.status == "FINISHED"
    assert [file.path for file in MlflowClient(uri).list_artifacts(first.run_id)] == ["note.txt"]
    assert journals(tmp_path / "spool") == []


def test_a_run_is_made_whole_from_its_history_in_storage(uri: str, tmp_path: Path) -> None:
    """Its driver died with its machine, journal and all, and MLflow lacks what it had not sent."""
    home = open_place(str(tmp_path / "run"))
    writer = HistoryWriter(home, "group", 0)
    rows = [writer.add(step, {"loss": step}) for step in range(10)]
    with ledger(uri, tmp_path) as first:
        first.replay(iter(rows[:4]))
    writer.cut(10)()
    writer.committed()
    writer.add(10, {"loss": 10})
    writer.cut(20)()  # of a checkpoint that does not count
    stored_state.save(home, 10, {"model": {"w": torch.ones(2)}}, {}, checkpoints.Retention(1))
    (synced,) = sync(home.uri)
    assert (synced.sent, synced.left, synced.refused) == (10, 0, 0)
    assert history(uri, first.run_id, "loss") == [(step, step) for step in range(10)]


def test_a_journal_of_an_address_with_a_password_asks_for_it(tmp_path: Path) -> None:
    about = About("http://***@h", "run", "a run", "/runs/a", "000001-abc")
    with closing(Journal.create(tmp_path, about)) as left:
        left.append(Row(1, 0, {"loss": 1}))
    (synced,) = sync(str(tmp_path))
    assert "MLFLOW_TRACKING_URI" in synced.error
    assert len(journals(tmp_path)) == 1


def test_a_place_that_is_no_folder_of_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name the folder of runs"):
        sync(str(tmp_path / "missing"))


def test_values_of_secret_variables_are_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "abcdef123456")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("SLASHED_SECRET", "/K7MDENG/wJalrXUtnFEMI")
    monkeypatch.setenv("WANDB_KEY", "0123456789abcdef")
    monkeypatch.setenv("PASSWORD_FILE", __file__)
    monkeypatch.setenv("A_WEB_TOKEN", "e" * 900)  # once an error that told it: no name is so long
    assert redact("e" * 900) == "***"
    text = "run --x abcdef123456 wJalrXUtnFEMI/K7MDENG /K7MDENG/wJalrXUtnFEMI 0123456789abcdef"
    assert redact(f"{text} {__file__}") == f"run --x *** *** *** *** {__file__}"
    assert redact("postgresql+psycopg2://me:p/w#?@host/db") == "postgresql+psycopg2://***@host/db"


@pytest.mark.parametrize("field", ["path", "holdout"])
def test_a_recipe_with_a_secret_in_it_is_refused_before_it_is_written(field: str) -> None:
    recipe = Recipe(data=Data(**{field: "s3://KEY:hunter2@bucket/data"}))
    with pytest.raises(
        ConfigError, match=rf"data\.{field} must hold no secret.*\*\*\*@bucket"
    ) as info:
        located(recipe)
    assert "hunter2" not in str(info.value)


def test_a_store_that_takes_no_files_holds_up_no_metric(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: MlflowClient, *_: Any) -> None:
        raise ImportError("no module named google")  # as with artifacts on gs:// without its client

    monkeypatch.setattr(outbox, "_PAUSES_S", (0.01, 0.05))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", refuse)
        with ledger(uri, tmp_path) as ours:
            ours.text("a/first.txt", "one")
            ours.text("second.txt", "two")
            ours.log(1, {"loss": 1})
    assert "no module named google" in caplog.text and "takes no files" in caplog.text
    run = MlflowClient(uri).get_run(ours.run_id)
    assert (run.data.metrics, run.info.status) == ({"loss": 1}, "FINISHED")
    (synced,) = sync(str(tmp_path))
    assert (synced.left, synced.error) == (0, "")
    found = MlflowClient(uri).list_artifacts(ours.run_id)
    assert sorted(file.path for file in found) == ["a", "second.txt"]
    assert MlflowClient(uri).get_run(ours.run_id).info.status == "FINISHED"
    assert sync(str(tmp_path)) == []


def test_one_value_that_mlflow_refuses_costs_no_other(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger(uri, tmp_path) as ours:
        for step in range(20):
            ours.log(step, {"loss": step, "images_per_s": 1})
        ours.log(20, {"loss": 20, "not*allowed": 1, "images_per_s": 1})
        ours.tag({"kept": "yes"}, {"bad*name": "1"})
        ours.log(21, {"loss": 21})
    assert history(uri, ours.run_id, "loss") == [(step, step) for step in range(22)]
    assert len(history(uri, ours.run_id, "images_per_s")) == 21
    assert MlflowClient(uri).get_run(ours.run_id).data.tags["kept"] == "yes"
    assert "never take not*allowed" in caplog.text


def test_nor_does_it_where_a_full_disk_keeps_rows_in_memory(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each of its values took another row along, unsent."""
    with ledger(uri, tmp_path) as ours:
        monkeypatch.setattr(Journal, "_write", lambda self: None)
        for step in range(6):
            ours.log(step, {"loss": step, f"not*allowed{step % 3}": 1, "images_per_s": 1})
    assert history(uri, ours.run_id, "loss") == [(step, step) for step in range(6)]
    assert len(history(uri, ours.run_id, "images_per_s")) == 6


def test_what_is_logged_to_a_deleted_run_waits_for_its_return(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_PAUSES_S", (0.01, 0.05))
    client = MlflowClient(uri)
    with ledger(uri, tmp_path) as ours:
        ours.log(1, {"loss": 1})
        wait_for(lambda: len(history(uri, ours.run_id, "loss")) == 1)
        client.delete_run(ours.run_id)
        ours.log(2, {"loss": 2})
        wait_for(lambda: ours.away)
        client.restore_run(ours.run_id)
    assert history(uri, ours.run_id, "loss") == [(1, 1), (2, 2)]


def test_a_run_that_has_ended_stays_as_it_ended(uri: str, tmp_path: Path) -> None:
    """Its process was killed between the end of the run and that of its journal."""
    with ledger(uri, tmp_path) as ours:
        ours.log(1, {"loss": 1})
        about = ours._journal.about
    left = Journal.create(tmp_path / "again", about)
    left.append(Row(1, 1, {"loss": 1}))
    left._file.close()
    (synced,) = sync(str(tmp_path / "again"))
    assert (synced.sent, synced.left) == (2, 0)
    assert MlflowClient(uri).get_run(ours.run_id).info.status == "FINISHED"
    assert history(uri, ours.run_id, "loss") == [(1, 1)]


def test_a_gap_is_filled_from_storage(uri: str, tmp_path: Path) -> None:
    home = open_place(str(tmp_path / "run"))
    writer = HistoryWriter(home, "group", 0)
    rows = [writer.add(step, {"loss": step}) for step in range(60)]
    writer.cut(60)()
    stored_state.save(home, 60, {"model": {"w": torch.ones(2)}}, {}, checkpoints.Retention(1))
    with ledger(uri, tmp_path) as ours:
        ours.replay(iter(rows[:10] + rows[50:]))
    (synced,) = sync(home.uri)
    assert (synced.left, synced.error) == (0, "")
    assert history(uri, ours.run_id, "loss") == [(step, step) for step in range(60)]


def test_a_run_that_is_gone_and_a_file_that_is_no_journal_are_told_at_once(
    uri: str, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    about = About(uri, "0123456789abcdef0123456789abcdef", "gone", "/runs/gone", "000001-abc")
    with closing(Journal.create(spool, about)) as left:
        left.append(Row(1, 0, {"loss": 1}))
    (spool / "x-y.journal").write_text("")
    lost = About(f"sqlite:///{tmp_path}/moved.db", "run", "moved", "/runs/moved", "000001-abc")
    with closing(Journal.create(spool, lost)) as left:
        left.append(Row(1, 0, {"loss": 1}))
    began = time.monotonic()
    errors = sorted(one.error for one in sync(str(tmp_path)))
    assert time.monotonic() - began < 30
    assert len(errors) == 3
    for told in ("MLflow has no such run", "is no journal", "no database"):
        assert any(told in error for error in errors), errors
    assert len(journals(spool)) == 3 and not (tmp_path / "moved.db").exists()


def test_a_field_that_is_changed_back_is_told(uri: str, tmp_path: Path) -> None:
    for workers in (1, 2, 1):
        with ledger(uri, tmp_path, resume=True) as ours:
            ours.describe(Recipe(run=Run(workers=workers)), {})
    data = MlflowClient(uri).get_run(ours.run_id).data
    assert data.tags["changed.run.workers"] == "1"


def test_a_run_that_goes_on_from_anothers_weights_is_another_run(uri: str, tmp_path: Path) -> None:
    with ledger(uri, tmp_path) as first:
        first.log(100, {"loss": 1})
    begin_anew(open_place(str(tmp_path / "run")))
    with ledger(uri, tmp_path, resume=True) as second:
        second.log(80, {"loss": 2})
    assert second.run_id != first.run_id
    with ledger(uri, tmp_path, resume=True) as third:
        assert third.run_id == second.run_id


def test_a_run_whose_folder_has_moved_goes_on_as_the_same(uri: str, tmp_path: Path) -> None:
    with ledger(uri, tmp_path) as first:
        first.log(0, {"loss": 0})
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    with ledger(uri, tmp_path, resume=True, home=moved) as second:
        second.log(1, {"loss": 1})
    assert second.run_id == first.run_id
    assert history(uri, first.run_id, "loss") == [(0, 0), (1, 1)]
    assert MlflowClient(uri).get_run(first.run_id).data.tags[HOME] == str(moved)


def test_a_copy_leaves_the_originals_curve_alone(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger(uri, tmp_path) as first:
        first.log(0, {"loss": 0})
        copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
        with ledger(uri, tmp_path, resume=True, home=copy) as second:
            second.log(1, {"loss": -1})
        first.log(1, {"loss": 1})
    assert f"{copy} is a copy of {tmp_path / 'run'}" in caplog.text
    assert second.run_id != first.run_id and second.last_step("loss") == 1
    assert history(uri, first.run_id, "loss") == [(0, 0), (1, 1)]
    with ledger(uri, tmp_path, resume=True, home=copy) as third:
        assert third.run_id == second.run_id


def test_another_path_to_the_same_folder_is_no_copy(uri: str, tmp_path: Path) -> None:
    with ledger(uri, tmp_path) as first:
        pass
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with ledger(uri, tmp_path, resume=True, home=tmp_path / "link") as second:
        pass
    assert second.run_id == first.run_id


def wait_for(what: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def driver(uri: str, folder: str) -> None:
    """Log a step whenever a line comes in; runs in a process of its own, to be killed."""
    with ledger(uri, Path(folder), resume=True, patience_s=20) as ours:
        print(ours.run_id, flush=True)
        for line in sys.stdin:
            ours.log(int(line), {"loss": int(line), "images_per_s": 1.0})
            print("logged", flush=True)


class Driver:
    """A process that logs steps as it is told."""

    def __init__(self, uri: str, folder: Path) -> None:
        code = "import sys; from tests.pipelines.test_ledger import driver; driver(*sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, uri, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout and self._process.stdin
        self._said, self._told = self._process.stdout, self._process.stdin
        self.run_id = self._said.readline().strip()

    def log(self, steps: range) -> None:
        for step in steps:
            self._told.write(f"{step}\n")
            self._told.flush()
            assert self._said.readline() == "logged\n"

    def end(self) -> None:
        self._told.close()
        self._process.wait(60)
        self._said.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(60)
        self._told.close()
        self._said.close()


@pytest.mark.slow
def test_outages_and_kills_leave_a_whole_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes and comes in mid-run; the driver is killed with its journal full, twice."""
    monkeypatch.setattr(outbox, "SETTLE_S", 0.5)
    server = LocalMlflow(tmp_path / "server")
    server.start()
    try:
        first = Driver(server.uri, tmp_path)
        first.log(range(50))
        wait_for(lambda: len(history(server.uri, first.run_id, "loss")) == 50)
        server.kill()
        first.log(range(50, 600))
        server.start()
        wait_for(lambda: len(history(server.uri, first.run_id, "loss")) == 600)
        server.kill()
        first.log(range(600, 900))
        first.kill()

        # It goes on while the server is still away, from a checkpoint at step 700, and is killed.
        second = Driver(server.uri, tmp_path)
        assert second.run_id == first.run_id
        second.log(range(700, 1000))
        second.kill()
        server.start()
        (synced,) = sync(str(tmp_path))
        assert (synced.left, synced.refused) == (0, 0)
        assert MlflowClient(server.uri).get_run(first.run_id).info.status == "KILLED"
        assert history(server.uri, first.run_id, "loss") == [(i, i) for i in range(1000)]

        third = Driver(server.uri, tmp_path)
        third.log(range(900, 1100))
        third.end()
        for name, value in ("loss", None), ("images_per_s", 1.0):
            expected = [(i, i if value is None else value) for i in range(1100)]
            assert history(server.uri, first.run_id, name) == expected
        assert MlflowClient(server.uri).get_run(first.run_id).info.status == "FINISHED"
        assert journals(tmp_path / "spool") == []
    finally:
        server.kill()


@pytest.mark.slow
def test_whoever_logs_waits_for_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send, senders = requests.Session.send, list[str]()

    def noted(*args: Any, **options: Any) -> requests.Response:
        senders.append(current_thread().name)
        return send(*args, **options)

    server = LocalMlflow(tmp_path / "server")
    server.start()
    try:
        uri = server.uri
        ours = ledger(uri, tmp_path)
        ours.__enter__()
        monkeypatch.setattr(requests.Session, "send", noted)
        for step in range(100):
            ours.log(step, {"loss": step})
            ours.text("note.txt", "hello")
        ours.finish("FINISHED")
        monkeypatch.undo()
        assert set(senders) == {"ledger"}
        assert len(history(uri, ours.run_id, "loss")) == 100
    finally:
        server.kill()
