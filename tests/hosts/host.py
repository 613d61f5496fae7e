"""A machine of our own: namespaces for its network, files and processes, with a real sshd.

It has the files of the machine that the tests run on, but its own homes, users, /tmp and /dev/shm.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hosts.network import METADATA, Cable, run

PROJECT = Path(__file__).parents[2]
DOCKERFILE = PROJECT / "infra/image/Dockerfile"
USER = "ubuntu"
NEEDED = ("ip", "nft", "nsenter", "rsync", "sshd", "ssh-keygen", "sysctl", "tini", "unshare")
"""Programs of the system; on Debian the packages iproute2 nftables openssh-server procps rsync
tini util-linux have them."""
NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc")


@dataclass(frozen=True, slots=True)
class Image:
    """The container image that machines can pull: this very environment, as a user would build it.

    Containers can't be run in every place where tests do, so a program of ours named `docker`
    plays Docker on the machines (:mod:`tests.hosts.docker`).
    """

    name: str
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_the_dockerfile(cls, name: str, **env: str) -> "Image":
        """Take the variables that the Dockerfile sets, and no others: Ray reads them.

        Its environment lies elsewhere here.
        """
        text = DOCKERFILE.read_text().replace("\\\n", " ")
        lines = [line.removeprefix("ENV ") for line in text.splitlines() if line.startswith("ENV ")]
        said = dict(pair.split("=", 1) for line in lines for pair in shlex.split(line))
        venv = str(Path(sys.executable).parent)
        return cls(name, {k: v.replace("/opt/venv/bin", venv) for k, v in said.items()} | env)


class Host:
    """One machine, from its start until it is killed."""

    def __init__(
        self,
        folder: Path,
        *,
        number: int,
        addresses: list[str],
        public_key: str,
        metadata: dict[str, Any],
        image: Image,
    ) -> None:
        self.folder, self.address = folder, addresses[0]
        self.metadata = folder / "metadata.json"
        folder.mkdir(parents=True)
        self.metadata.write_text(json.dumps(metadata))
        _prepare(folder, addresses[0], public_key, image)
        with (folder / "console.log").open("w") as log:
            self._process = subprocess.Popen(
                ["unshare", *NAMESPACES, "--kill-child", "bash", str(folder / "start.sh")],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.cable = Cable(number, self._process.pid)
        self.cable.plug_in(addresses)

    def tell(self, said: dict[str, object]) -> None:
        """Have its metadata service say something more, by the names under meta-data/."""
        told = json.loads(self.metadata.read_text()) | said
        fresh = self.metadata.with_suffix(".new")
        fresh.write_text(json.dumps(told))
        fresh.rename(self.metadata)

    def pulled(self) -> list[str]:
        """List what was asked of its `docker`, one command a line."""
        log = self.folder / "home/docker.log"
        return log.read_text().splitlines() if log.exists() else []

    def kill(self) -> None:
        """End it as a cloud does: at once, with all that runs on it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _prepare(folder: Path, address: str, public_key: str, image: Image) -> None:
    """Write what a machine has on its disk when it comes up."""
    home, etc, programs = folder / "home", folder / "etc", folder / "bin"
    for each in (home / ".ssh", etc, programs, folder / "tmp", folder / "container"):
        each.mkdir(parents=True)
    (folder / "tmp").chmod(0o1777)
    name = "ip-" + address.replace(".", "-")
    (etc / "hostname").write_text(name)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
    (etc / "passwd").write_text(_users(USER))
    (etc / "passwd.container").write_text(_users("ray"))
    (etc / "group").write_text(f"root:x:0:\nnogroup:x:65534:\n{USER}:x:1000:\n")
    (etc / "shadow").write_text(f"root:*:1::::::\nsshd:*:1::::::\n{USER}:*:1::::::\n")
    (home / ".ssh" / "authorized_keys").write_text(public_key + "\n")
    path = f"export PATH={programs}:$PATH\n"
    for file in (".profile", ".bashrc"):
        (home / file).write_text(path)
    inside = folder / "container/home"
    (inside / ".ray").mkdir(parents=True)
    # As in infra/image/Dockerfile: login shells, which Ray starts, begin with a PATH of their own.
    (inside / ".bashrc").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    for each in [home, *home.rglob("*"), folder / "container", inside, *inside.rglob("*")]:
        os.chown(each, 1000, 1000)

    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "hostkey"))
    (folder / "sshd_config").write_text(_sshd_config(folder))
    for program in ("docker", "aws"):
        script = programs / program
        module = f"tests.hosts.{program}"
        script.write_text(
            f"#!/bin/sh\nPYTHONPATH={PROJECT} MACHINE={folder} "
            f'exec {sys.executable} -m {module} "$@"\n'
        )
        script.chmod(0o755)
    # Docker's daemon is root, whoever asks it. These two of its powers are all that is needed here.
    for program in ("nsenter", "unshare"):
        copy = programs / f"root-{program}"
        shutil.copy(str(shutil.which(program)), copy)
        copy.chmod(0o4755)
    (folder / "image.json").write_text(json.dumps({"name": image.name, "env": image.env}))
    (folder / "start.sh").write_text(_start(folder))


def _users(user: str) -> str:
    return (
        "root:x:0:0:root:/root:/bin/bash\n"
        "sshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        f"{user}:x:1000:1000:{user}:/home/{user}:/bin/bash\n"
    )


def _sshd_config(folder: Path) -> str:
    return "\n".join(
        [
            f"HostKey {folder}/hostkey",
            f"AllowUsers {USER}",
            "PasswordAuthentication no",
            "UsePAM no",
            "StrictModes no",
            "PidFile none",
            "MaxStartups 100",
            "MaxSessions 100",
            "Subsystem sftp internal-sftp",
            "",
        ]
    )


def _start(folder: Path) -> str:
    """Write the first program of a machine: mounts, metadata service, sshd."""
    kept = {str(PROJECT), sys.prefix, sys.base_prefix}
    quoted = [shlex.quote(path) for path in sorted(kept)]
    keep = "\n".join(
        f"mkdir -p {folder}/keep/{i}; mount --bind {path} {folder}/keep/{i}"
        for i, path in enumerate(quoted)
    )
    give = "\n".join(
        f"mkdir -p {path}; mount --rbind {folder}/keep/{i} {path}" for i, path in enumerate(quoted)
    )
    return f"""
set -e
mount --make-rprivate /
{keep}
mount -t tmpfs -o mode=755 tmpfs /root
mount -t tmpfs -o mode=755 tmpfs /home
{give}
mkdir /home/{USER} /home/ray
mount --bind {folder}/home /home/{USER}
for file in hosts passwd group shadow; do mount --bind {folder}/etc/$file /etc/$file; done
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind {folder}/tmp /tmp
hostname -F {folder}/etc/hostname
mkdir -p /run/sshd
until ip route show default | grep -q eth0; do sleep 0.05; done
{sys.executable} {PROJECT}/tests/hosts/metadata.py {folder}/metadata.json {METADATA} 80 &
until (: < /dev/tcp/{METADATA}/80) 2>/dev/null; do sleep 0.05; done
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \\
  tini -g -- /usr/sbin/sshd -D -e -f {folder}/sshd_config
"""
