"""The way to a head on AWS: the real ssh, with the options of a launch, through a real sshd."""

import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.launch import aws
from pipelines.launch.aws import Aws
from pipelines.launch.errors import LaunchError
from pipelines.launch.record import Record, write_private
from tests.ssh_server import AVAILABLE, SshServer, ssh_server

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="OpenSSH's server is not installed")


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[SshServer]:
    with ssh_server(tmp_path) as server:
        yield server


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What listens at the far end."""

    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"head")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(aws, "PORT", server.server_port)
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def backend(sshd: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Aws:
    monkeypatch.setenv("DROPPOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    record = Record(name="vit", on="aws", region="us-west-2", phase="submitted")
    record.folder.mkdir(parents=True)
    config = {
        "cluster_name": "studio-vit",
        "provider": {"type": "aws", "region": "us-west-2"},
        "auth": {"ssh_user": sshd.user, "ssh_private_key": str(sshd.key), "ssh_port": sshd.port},
        "head_node_type": "head",
        "available_node_types": {"head": {"node_config": {"InstanceType": "m7i.xlarge"}}},
    }
    write_private(record.file("cluster.yaml"), yaml.safe_dump(config))
    head = {"PublicIpAddress": "127.0.0.1", "PrivateIpAddress": "10.0.0.1"}
    monkeypatch.setattr(Aws, "_machines", lambda self, states, **tags: [head])
    return Aws(record)


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read()


def test_the_head_is_reached_and_reached_again_after_ssh_was_killed(
    backend: Aws, dashboard: None
) -> None:
    with backend.address() as address:
        assert read(address.url) == b"head"
        (ssh,) = [each for each in psutil.Process().children() if each.name() == "ssh"]
        ssh.kill()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                assert read(address.url) == b"head"
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError("the tunnel did not come back")


def test_another_machine_at_the_heads_address_is_not_talked_to(
    backend: Aws, dashboard: None, sshd: SshServer, tmp_path: Path
) -> None:
    with backend.address():
        pass
    known = tmp_path / "home" / "launches" / "vit" / "known_hosts"
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    kind, key, _ = other.with_suffix(".pub").read_text().split(" ", 2)
    known.write_text(f"[127.0.0.1]:{sshd.port} {kind} {key}\n")
    with pytest.raises(LaunchError, match="Host key verification failed"), backend.address():
        pass
