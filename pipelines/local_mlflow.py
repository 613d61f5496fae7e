"""A real MLflow server on this machine, for drills and tests."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

READY_S = 180
"""Seconds a server may take to answer: importing MLflow takes ten on a busy machine."""


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LocalMlflow:
    """A server process that can be killed and started again: same address, same runs."""

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        *,
        database: str | None = None,
        artifacts: str | None = None,
    ) -> None:
        """Choose its port; nothing runs yet.

        Args:
            folder: Where its database, its artifacts and its log go.
            port: A free one when not given.
            database: Address of another database; an SQLite file when not given.
            artifacts: Folder or s3:// URI of the artifacts.
        """
        self._database = database or f"sqlite:///{folder}/mlflow.db"
        self._artifacts = artifacts or str(folder / "artifacts")
        self._folder = folder
        self._port = free_port() if port is None else port
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"
        """Its address."""

    def start(self) -> None:
        """Run it; returns once it takes connections.

        Raises:
            RuntimeError: If it ends, or is not ready in time; the text is its log.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / "log"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
            *("--port", str(self._port), "--workers", "1"),
            *("--backend-store-uri", self._database),
            *("--artifacts-destination", self._artifacts),
        ]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        deadline = monotonic() + READY_S
        while monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            sleep(0.2)
        raise RuntimeError(f"the MLflow server did not start: {log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End it and its workers at once."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
