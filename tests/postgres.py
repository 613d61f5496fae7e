"""A real PostgreSQL on this machine, for tests; its programs come with Debian's package."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.local_mlflow import free_port

OWNER = "postgres"
"""PostgreSQL refuses to run as root; its packages bring a user of their own."""
USER = "droppos"


def found() -> bool:
    """Whether a server can be started here: needs its programs, its user, and root."""
    with suppress(KeyError):
        pwd.getpwnam(OWNER)
        return shutil.which("initdb") is not None and os.getuid() == 0
    return False


@contextmanager
def postgres_server() -> Iterator[int]:
    """Run a server with an empty database `postgres`, owned by USER, until the block ends.

    Yields:
        Its port on 127.0.0.1; it asks for no password.
    """
    owner = pwd.getpwnam(OWNER)
    bin_ = Path(shutil.which("initdb") or "initdb").resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="droppos-postgres-"))
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    port = free_port()
    _as_owner(f"{bin_}/initdb", "-D", f"{folder}/data", "-A", "trust", "-U", USER)
    options = f"'-p {port} -k {folder} -h 127.0.0.1'"
    control = (f"{bin_}/pg_ctl", "-w", "-D", f"{folder}/data", "-l", f"{folder}/log")
    _as_owner(*control, "-o", options, "start")
    try:
        yield port
    finally:
        _as_owner(*control, "-m", "immediate", "stop")
        shutil.rmtree(folder)


def _as_owner(*command: str) -> None:
    subprocess.run(
        ["su", "-s", "/bin/sh", OWNER, "-c", " ".join(command)],
        check=True,
        capture_output=True,
        timeout=120,
    )
