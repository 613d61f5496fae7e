"""A team's MLflow: PostgreSQL behind it, artifacts on S3; both real, over HTTP."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipelines.ledger import Ledger
from pipelines.local_mlflow import LocalMlflow, free_port
from pipelines.local_s3 import S3Server

OWNER = "postgres"
"""PostgreSQL refuses to run as root; its packages bring a user of their own."""


def as_owner(*command: str) -> None:
    subprocess.run(
        ["su", "-s", "/bin/sh", OWNER, "-c", " ".join(command)],
        check=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Address of an empty database."""
    found = shutil.which("initdb")
    with suppress(KeyError):
        owner = pwd.getpwnam(OWNER)
        if found is not None and os.getuid() == 0:
            bin_ = Path(found).resolve().parent
            folder = Path(tempfile.mkdtemp(prefix="droppos-postgres-"))
            os.chown(folder, owner.pw_uid, owner.pw_gid)
            port = free_port()
            as_owner(f"{bin_}/initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "droppos")
            options = f"'-p {port} -k {folder} -h 127.0.0.1'"
            control = (f"{bin_}/pg_ctl", "-w", "-D", f"{folder}/data", "-l", f"{folder}/log")
            as_owner(*control, "-o", options, "start")
            try:
                yield f"postgresql+psycopg2://droppos@127.0.0.1:{port}/postgres"
            finally:
                as_owner(*control, "-m", "immediate", "stop")
                shutil.rmtree(folder)
            return
    pytest.skip("needs PostgreSQL's initdb, its user, and root")


@pytest.mark.slow
def test_a_run_is_whole_in_postgresql_with_its_files_on_s3(
    postgres: str, s3_env: S3Server, tmp_path: Path
) -> None:
    bucket = s3_env.bucket("mlflow")
    server = LocalMlflow(tmp_path / "server", database=postgres, artifacts=f"{bucket}/artifacts")
    server.start()
    try:
        for first in (0, 500):
            with Ledger(
                server.uri, "team", "a run", str(tmp_path / "run"), tmp_path, resume=True
            ) as ours:
                for step in range(max(0, first - 20), first + 500):
                    ours.log(step, {"train/loss": step})
                ours.text("pictures/note.txt", "hello")
        client = MlflowClient(server.uri)
        points = client.get_metric_history(ours.run_id, "train/loss")
        assert sorted((point.step, point.value) for point in points) == [
            (i, i) for i in range(1000)
        ]
        assert client.get_run(ours.run_id).info.status == "FINISHED"
        copy = client.download_artifacts(ours.run_id, "pictures/note.txt", str(tmp_path))
        assert Path(copy).read_text() == "hello"
    finally:
        server.kill()
