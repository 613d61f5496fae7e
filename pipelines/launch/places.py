"""The place that `--on` means, for a launch that begins and for one that is looked for."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from droppos.errors import ConfigError
from pipelines.launch import record
from pipelines.launch.backend import Backend
from pipelines.launch.on import On
from pipelines.launch.record import Record
from pipelines.launch.standing import Standing, url_of

CLUSTER_FILE, MANIFESTS, STACK = "cluster.yaml", "infra/kuberay/base", "droppos"


def planned(name: str, on: On, *, keep: bool) -> tuple[Record, Backend]:
    """Plan a launch.

    Raises:
        ConfigError: If name or place are impossible.
    """
    record.check_name(name)
    where = _spelt("aws" if on.on is None else on.on)
    source = Path(on.cluster or _usual(where)).expanduser().absolute()
    made = Record(name=name, on=where, keep=keep, source=str(source))
    if where == "aws":
        made = replace(
            made, region=on.region, stack=on.stack or STACK, mlflow_stack=on.mlflow_stack
        )
    elif where == "kube":
        made = replace(made, context=on.context, namespace=on.namespace)
    return made, backend_of(made, verbose=on.verbose)


def found(name: str, on: On) -> tuple[Record, Backend]:
    """Find a launch: in this machine's records, or where it is said to be.

    Raises:
        ConfigError: If nothing is known of it.
    """
    kept = record.find(name)
    if on.on is not None and (kept is None or kept.phase == "ended"):
        return planned(name, on, keep=False)
    if kept is None:
        known = ", ".join(each.name for each in record.all_records()) or "none"
        raise ConfigError(
            f"this machine knows of no launch {name} (it knows of {known}); say where it is: "
            "--on aws --stack STACK, --on kube or --on ADDRESS"
        )
    kept.check_place(
        _said(on),
        "leave those flags out to mean that launch; with DROPPOS_HOME set to another folder, "
        "another one is found",
    )
    return kept, backend_of(kept, verbose=on.verbose)


def _said(on: On) -> Mapping[str, str]:
    """Take what a person said of the place; some of it is said of one kind of place only."""
    fields = {name: getattr(on, name) for name in ("region", "stack", "context", "namespace")}
    said = {name: value for name, value in fields.items() if value is not None}
    if on.on is not None:
        said["on"] = _spelt(on.on)
    elif said.keys() & {"region", "stack"}:
        said["on"] = "aws"
    elif said:
        said["on"] = "kube"
    return said


def _spelt(on: str) -> str:
    return on.lower() if on.lower() in ("aws", "kube") else url_of(on)


def backend_of(made: Record, *, verbose: bool = False) -> Backend:
    """Make what a record means; clouds' libraries are imported only for their own."""
    if made.on == "aws":
        from pipelines.launch.aws import Aws

        return Aws(made, verbose=verbose)
    if made.on == "kube":
        from pipelines.launch.kube import Kube

        return Kube(made)
    return Standing(made.on)


def _usual(on: str) -> str:
    return MANIFESTS if on == "kube" else CLUSTER_FILE


def launch_name(run: str) -> str:
    """Make a launch's name of a run's: small letters, digits and dashes."""
    return "".join(char if char.isalnum() else "-" for char in run.lower()).strip("-")
