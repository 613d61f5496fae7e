"""A stand-in for the `docker` of a machine: as much of it as Ray's launcher asks for.

A container is a mount namespace of its own, with a home, a /tmp and a user of its own and the
binds that were asked for; so what Ray copies and runs in there really is in there. It has the
machine's network (`--net=host`), processes and, in place of an image's, files.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

MACHINE = Path(os.environ.get("MACHINE", "/nonexistent"))
STATE, LOGIN = MACHINE / "home/docker.json", MACHINE / "home/docker-login"
USER_HOME = "/home/ray"
AS_ROOT = ("--mount", "--setuid=0", "--setgid=0")


def image() -> dict[str, Any]:
    return json.loads((MACHINE / "image.json").read_text())


def image_env() -> dict[str, str]:
    return image()["env"]


def container() -> dict[str, Any] | None:
    """Find the container, if it runs."""
    if not STATE.exists():
        return None
    state = json.loads(STATE.read_text())
    return state if Path(f"/proc/{state['process']}").exists() else None


def login(words: list[str]) -> None:
    if not sys.stdin.read().strip():
        sys.exit("Error: Password Required")
    LOGIN.write_text(words[-1])


def pull(words: list[str]) -> None:
    registry = words[-1].split("/")[0]
    if not LOGIN.exists() or LOGIN.read_text() != registry:
        sys.exit(f"Error response from daemon: {words[-1]}: no basic auth credentials")
    if words[-1] != image()["name"]:
        sys.exit(f"Error response from daemon: manifest for {words[-1]} not found")


def inspect(words: list[str]) -> None:
    """Answer the four templates that Ray asks for."""
    _, template, name = words
    if name == image()["name"]:
        print(json.dumps([f"{key}={value}" for key, value in image_env().items()]))
        return
    state = container()
    if state is None:
        sys.exit(f"Error: No such object: {name}")
    answers = {
        "{{.State.Running}}": "true",
        "{{.Config.Image}}": state["image"],
        "{{json .Mounts}}": json.dumps([{"Destination": to} for _, to in state["binds"]]),
    }
    print(answers[template])


def start(words: list[str]) -> None:
    parser = argparse.ArgumentParser("docker run")
    for flag in ("--rm", "-d", "-it"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--name", "--ulimit", "--security-opt", "--shm-size", "--net"):
        parser.add_argument(flag, action="append")
    parser.add_argument("-v", action="append", default=[])
    parser.add_argument("-e", action="append", default=[])
    parser.add_argument("image")
    parser.add_argument("command")
    asked = parser.parse_args(words)
    if asked.image != image()["name"]:
        sys.exit(f"Unable to find image {asked.image}")
    binds = [each.split(":", 1) for each in asked.v]
    process = subprocess.Popen(
        [MACHINE / "bin/root-unshare", *AS_ROOT, "bash", "-c", _inside(binds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(MACHINE / "home/container.log").open("w"),
        start_new_session=True,
    )
    state = {
        "name": asked.name[0],
        "image": asked.image,
        "binds": binds,
        "env": image_env() | dict(each.split("=", 1) for each in asked.e),
        "process": process.pid,
    }
    STATE.write_text(json.dumps(state))
    ready = MACHINE / "container/ready"
    while not ready.exists():
        if process.poll() is not None:
            sys.exit(f"the container ended: {(MACHINE / 'home/container.log').read_text()}")
    print(process.pid)


def _inside(binds: list[list[str]]) -> str:
    """Write what makes the container's files: its home, the binds, its users, its /tmp."""
    lines = [
        "set -e",
        "mount --make-rprivate /",
        f"mkdir -p {MACHINE}/container/tmp",
        f"chmod 1777 {MACHINE}/container/tmp",
        f"mount --bind {MACHINE}/container/home {USER_HOME}",
        f"mount --bind {MACHINE}/etc/passwd.container /etc/passwd",
    ]
    for source, to in (map(shlex.quote, bind) for bind in binds):
        lines += [
            # Docker makes what is not there, as root.
            f"mkdir -p $(dirname {to}); [ -e {source} ] || mkdir -p {source}",
            f"if [ -d {source} ]; then mkdir -p {to}; else touch {to}; fi",
            f"mount --bind {source} {to}",
        ]
    lines += [
        f"mount --bind {MACHINE}/container/tmp /tmp",
        f"touch {MACHINE}/container/ready",
        "exec sleep infinity",
    ]
    return "\n".join(lines)


def execute(words: list[str]) -> None:
    while words[0].startswith("-"):
        words = words[1:]
    name, *command = words
    state = container()
    if state is None or state["name"] != name:
        sys.exit(f"Error response from daemon: No such container: {name}")
    env = [f"{key}={value}" for key, value in state["env"].items()]
    enter = str(MACHINE / "bin/root-nsenter")
    where = [f"--target={state['process']}", "--mount", "--setuid=1000", "--setgid=1000"]
    os.execv(enter, [enter, *where, f"--wd={USER_HOME}", "env", "-i", *env, *command])


def stop(words: list[str]) -> None:
    if state := container():
        (MACHINE / "container/ready").unlink()
        enter = [MACHINE / "bin/root-nsenter", f"--target={state['process']}", *AS_ROOT]
        subprocess.run([*enter, "kill", "-9", str(state["process"])], check=True)


def info(words: list[str]) -> None:
    print("map[runc:{}]")


COMMANDS = {
    "login": login,
    "pull": pull,
    "inspect": inspect,
    "info": info,
    "run": start,
    "exec": execute,
    "stop": stop,
}

if __name__ == "__main__":
    with (MACHINE / "home/docker.log").open("a") as log:
        log.write(shlex.join(sys.argv[1:]) + "\n")
    COMMANDS[sys.argv[1]](sys.argv[2:])
