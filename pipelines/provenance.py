"""Where a run comes from: code, command, packages and machines, as tags and a list for MLflow."""

import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from pipelines.secrets import redact

ROOT = Path(__file__).resolve().parent.parent
REVISION = "mlflow.source.git.commit"
"""MLflow's own tag."""


def provenance() -> dict[str, str]:
    """Tell which code runs, and how it was called.

    Returns:
        Tags: versions, the command, and the git revision when the code runs from a checkout.
    """
    tags = {f"version.{name}": version(name) for name in ("droppos", "torch", "ray", "mlflow")}
    tags["version.python"] = sys.version.split()[0]
    tags["command"] = redact(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    # An installed package may lie inside a checkout of something else, its .venv say.
    if _git("rev-parse", "--show-toplevel") == str(ROOT):
        tags[REVISION] = _git("rev-parse", "HEAD")
        tags["code.changed_files"] = str(len(_git("status", "--porcelain").splitlines()))
    return tags


def origin() -> dict[str, str]:
    """Tell the same without secrets, for what is kept in storage."""
    return {name: redact(value) for name, value in provenance().items()}


def packages() -> str:
    """List the packages of this process as pip does, ``name==version`` a line."""
    found = {(each.metadata["Name"] or "?").lower(): each.version for each in distributions()}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found))


def cluster_hardware() -> dict[str, str]:
    """Tell what the cluster has now, as tags; a Ray must be connected."""
    import ray  # here: half of the time of the ledger's import, which needs none

    nodes = [node for node in ray.nodes() if node["Alive"]]
    have = ray.cluster_resources()
    kinds = sorted(
        name.removeprefix("accelerator_type:")
        for name in have
        if name.startswith("accelerator_type:")
    )
    tags = {
        "hardware.nodes": str(len(nodes)),
        "hardware.cpus": f"{have.get('CPU', 0):g}",
        "hardware.gpus": f"{have.get('GPU', 0):g}",
        "hardware.memory_gb": f"{have.get('memory', 0) / 1e9:.0f}",
    }
    return tags | ({"hardware.gpu_types": ", ".join(kinds)} if kinds else {})


def workers_hardware(started: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Tell on what a group of workers trains, as tags.

    Args:
        started: What each worker said at its start.
    """
    told = list(started)
    devices = Counter(event["device"] for event in told)
    return {
        "hardware.workers": ", ".join(f"{n} x {device}" for device, n in sorted(devices.items())),
        "hardware.worker_nodes": str(len({event["node"] for event in told})),
    }


def _git(*command: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a slow disk
        return ""
    return done.stdout.strip()
