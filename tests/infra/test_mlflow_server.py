"""The team's MLflow server as it is started in production: real PostgreSQL, real S3, over HTTP."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic, sleep

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url

from infra.mlflow import serve
from pipelines.local_mlflow import READY_S, free_port
from pipelines.local_s3 import S3Server

ADMIN, JOBS = "an-apple-a-day-keeps-9", "the-rain-in-spain-falls-7"
SAFE = {
    **{"PGHOST": "db.internal", "PGDATABASE": "postgres", "PGUSER": "droppos"},
    "PGPASSWORD": "q0Zr8mYw2LkX5vTb",
    "MLFLOW_ARTIFACTS": "s3://bucket/mlflow",
    "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow.droppos.internal:5000",
    "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "http://mlflow.droppos.internal:5000",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "K3pT" * 10,
    "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN,
    "MLFLOW_JOBS_PASSWORD": JOBS,
}
"""An environment in which the server starts."""


def test_nothing_is_said_of_a_safe_environment() -> None:
    assert serve.complaints(SAFE) == []


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("missing", ["", None])
def test_nothing_it_needs_may_be_missing(name: str, missing: str | None) -> None:
    environment = {key: value for key, value in SAFE.items() if key != name}
    if missing is not None:
        environment[name] = missing
    assert serve.complaints(environment) == [f"{name} is not set"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MLFLOW_AUTH_ADMIN_PASSWORD", "password1234", "default passwords"),
        ("MLFLOW_AUTH_ADMIN_PASSWORD", "MyLongAdminPassword2026", "default passwords"),
        ("MLFLOW_JOBS_PASSWORD", "short-one", "9 characters, expected at least 16"),
        ("MLFLOW_FLASK_SERVER_SECRET_KEY", "K3pT" * 7, "28 characters, expected at least 32"),
        ("MLFLOW_SERVER_ALLOWED_HOSTS", "*", "expected names"),
        ("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "https://*.example.org", "expected names"),
        ("MLFLOW_ARTIFACTS", "/var/mlflow", "expected s3://BUCKET/FOLDER"),
    ],
)
def test_what_is_unsafe_is_refused_without_showing_a_secret(
    name: str, value: str, said: str
) -> None:
    complaints = serve.complaints({**SAFE, name: value})
    assert complaints
    assert all(line.startswith(name) for line in complaints)
    assert said in " ".join(complaints)
    assert (value in " ".join(complaints)) == (name not in serve.LENGTHS)


def test_no_secret_is_on_the_command_line() -> None:
    line = " ".join(serve.arguments(SAFE))
    assert "--app-name basic-auth" in line
    for name in serve.LENGTHS:
        assert SAFE[name] not in line, name


def test_the_script_ends_with_all_that_is_wrong() -> None:
    ended = subprocess.run(
        [sys.executable, serve.__file__],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ".")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "MLFLOW_AUTH_ADMIN_PASSWORD is not set" in ended.stderr
    assert "Traceback" not in ended.stderr


class Server:
    """The real script; it can be ended and started again."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.port = int(settings["MLFLOW_PORT"])
        self.uri = f"http://127.0.0.1:{self.port}"
        self._log = folder / "log"
        self._settings = settings

    def start(self, **changed: str) -> None:
        environment = {**os.environ, **self._settings, **changed}
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, serve.__file__],
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        deadline = monotonic() + READY_S
        while monotonic() < deadline and self._process.poll() is None:
            try:
                requests.get(f"{self.uri}/health", timeout=2).raise_for_status()
                return
            except requests.RequestException:
                sleep(0.2)
        raise RuntimeError(self._log.read_text()[-3000:])

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def server(postgres: str, s3_env: S3Server, tmp_path: Path) -> Iterator[Server]:
    database, port = make_url(postgres), free_port()
    host = f"127.0.0.1:{port}"
    server = Server(
        tmp_path,
        {
            **SAFE,
            **{"PGHOST": str(database.host), "PGPORT": str(database.port)},
            **{"MLFLOW_HOST": "127.0.0.1", "MLFLOW_PORT": str(port)},
            "MLFLOW_ARTIFACTS": f"{s3_env.bucket('team-mlflow')}/mlflow",
            "MLFLOW_SERVER_ALLOWED_HOSTS": host,
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{host}",
        },
    )
    server.start()
    yield server
    server.kill()


@pytest.mark.shares
def test_it_lets_in_who_it_knows_and_keeps_all_over_a_restart(
    server: Server, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_user(name: str, password: str) -> MlflowClient:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        return MlflowClient(server.uri)

    experiments = f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=9"
    jobs, admin = ("jobs", JOBS), ("admin", ADMIN)

    # Nobody without a password, with a wrong one, under another name, or from another's page.
    assert requests.get(experiments, timeout=20).status_code == 401
    assert requests.get(experiments, auth=("admin", "guess"), timeout=20).status_code == 401
    assert requests.get(experiments, auth=admin, timeout=20).status_code == 200
    rebound = requests.get(experiments, auth=admin, headers={"Host": "evil.example"}, timeout=20)
    assert rebound.status_code == 403
    foreign = requests.post(
        f"{server.uri}/api/2.0/mlflow/experiments/create",
        json={"name": "theirs"},
        auth=admin,
        headers={"Origin": "http://evil.example"},
        timeout=20,
    )
    assert foreign.status_code == 403

    # The job's run, its file on S3; no credentials for S3 went to the client.
    client = as_user(*jobs)
    experiment = client.create_experiment("pretraining")
    run = client.create_run(experiment)
    client.log_metric(run.info.run_id, "train/loss", 6.04, step=1)
    for name in s3_env.env:
        monkeypatch.delenv(name)
    (tmp_path / "note.txt").write_text("hello")
    client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
    key = f"mlflow/{experiment}/{run.info.run_id}/artifacts/note.txt"
    stored = s3_env.client().get_object(Bucket="team-mlflow", Key=key)
    assert stored["Body"].read() == b"hello"

    # Another user sees nothing of it.
    made = requests.post(
        f"{server.uri}/api/2.0/mlflow/users/create",
        json={"username": "guest", "password": "a-guest-of-the-house"},
        auth=admin,
        timeout=20,
    )
    assert made.status_code == 200
    guest = as_user("guest", "a-guest-of-the-house")
    assert "pretraining" not in [found.name for found in guest.search_experiments()]
    with pytest.raises(MlflowException, match="Permission denied"):
        guest.get_run(run.info.run_id)
    with pytest.raises(MlflowException, match="403"):
        guest.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))

    # All is there again after a kill; and a password that was changed is the user's.
    server.kill()
    server.start(**s3_env.env, MLFLOW_JOBS_PASSWORD="a-later-one-by-the-vault")
    assert requests.get(experiments, auth=jobs, timeout=20).status_code == 401
    client = as_user("jobs", "a-later-one-by-the-vault")
    assert client.get_run(run.info.run_id).data.metrics == {"train/loss": 6.04}
    copy = client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))
    assert Path(copy).read_text() == "hello"
    assert as_user("guest", "a-guest-of-the-house").search_experiments() == []
