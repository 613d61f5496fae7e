"""A team's MLflow: PostgreSQL behind it, artifacts on S3; both real, over HTTP."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipelines.ledger import Ledger
from pipelines.local_mlflow import LocalMlflow
from pipelines.local_s3 import S3Server


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
