"""A real Ray head with its jobs API and token authentication, beside whatever else runs here.

`ray stop` would end every Ray of the machine. So the head runs in the foreground of a session of
its own, on ports and in a folder of its own, and its process group is what ends.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_S = 60


@dataclass(frozen=True)
class RayHead:
    """A head that stands."""

    url: str
    """Of the jobs API."""
    token_file: Path

    @property
    def token(self) -> str:
        return self.token_file.read_text()


@contextmanager
def ray_head(cpus: int, env: Mapping[str, str]) -> Iterator[RayHead]:
    """Start a head, and end it and all its processes."""
    # Not pytest's own folder: a socket's path must have less than 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="head-"))
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    gcs, dashboard, agent, grpc, client, metrics, export = _free_ports(7)
    bin = Path(sys.executable).parent
    command = [
        *(bin / "ray", "start", "--head", "--block", f"--port={gcs}"),
        *(f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
        *(f"--runtime-env-agent-port={export}", f"--temp-dir={folder}", f"--num-cpus={cpus}"),
        *("--object-store-memory=200000000", "--disable-usage-stats"),
    ]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            command,
            env={
                **inherited,
                "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",  # jobs say `python`
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token_file),
                **env,
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait_for(url, head, folder / "head.log")
        yield RayHead(url, token_file)
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str, head: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and head.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2).close()
        except urllib.error.HTTPError:
            return  # it wants a token
        except OSError:
            time.sleep(0.2)
        else:
            raise RuntimeError("the head lets everybody in")
    raise RuntimeError(f"no head after {START_S} s:\n{log.read_text()[-2000:]}")


def _end(head: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(head.pid, number)
        with suppress(subprocess.TimeoutExpired):
            head.wait(5)
            if number is signal.SIGKILL:
                return


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
