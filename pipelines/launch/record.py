"""What this machine knows of its launches: ~/.droppos/launches/NAME/.

    record.json   where, what and how far; written before the first request that could cost money
    cluster.yaml  the filled file of a cluster on AWS, or the manifest of one on Kubernetes
    package.zip   the working directory that is sent
    up.log, down.log, job.log   what the tools and the job said
    known_hosts   the head's host key, as it was at first sight

So attach, stop and down work from another terminal, and after a crash at any point. The folder is
its owner's alone: the filled file says how to reach the machines.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from droppos.errors import ConfigError

Phase = Literal["starting", "up", "submitted", "ending", "ended"]
PLACE = ("on", "account", "region", "stack", "context", "namespace")
"""Fields that say where a launch is; another place may have a cluster of the same name."""
NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
"""Of a launch: it becomes a cluster's name, a Kubernetes object's and a tag."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One launch."""

    name: str
    on: str
    """aws, kube, or the address of a cluster that stands."""
    keep: bool = False
    """Whether the cluster stays when the job has ended."""
    phase: Phase = "starting"
    job: str | None = None
    """The last job that was, or was about to be, submitted."""
    mark: str | None = None
    """By which that job is known to be ours: its name may be another's."""
    region: str | None = None
    stack: str | None = None
    mlflow_stack: str | None = None
    account: str | None = None
    """Number of AWS's account."""
    context: str | None = None
    """Of kubectl."""
    namespace: str | None = None
    source: str = ""
    """The cluster's file; relative paths in it are meant from its folder."""
    costs: str = ""
    """What an hour costs, as it was at the launch: over a broken line nobody can be asked."""
    started: float = 0.0
    """Seconds since 1970."""

    @property
    def again(self) -> bool:
        """Whether its cluster was kept, and another launch may run on it."""
        return self.keep and self.phase == "up"

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return home() / self.name

    @property
    def place(self) -> Mapping[str, str]:
        """Where it is, as far as it is known."""
        return {name: value for name in PLACE if (value := getattr(self, name)) is not None}

    def may_be_at(self, said: Mapping[str, str]) -> bool:
        """Tell whether nothing that is known of its place speaks against it."""
        return all(self.place.get(name, value) == value for name, value in said.items())

    def check_place(self, said: Mapping[str, str], way_out: str) -> None:
        """Refuse another place than the launch's.

        Raises:
            ConfigError: Naming both.
        """
        if not self.may_be_at(said):
            raise ConfigError(
                f"the launch {self.name} of this machine is at {_listed(self.place)}; "
                f"this would be another place, {_listed(said)}; {way_out}"
            )

    def is_on_disk(self) -> bool:
        """Tell whether this machine keeps it: not one that another began, or a later one."""
        kept = find(self.name)
        return kept is not None and kept.started == self.started

    def file(self, name: str) -> Path:
        """Name a file beside it."""
        return self.folder / name

    def save(self) -> None:
        """Write it, whole or not at all."""
        write_private(self.file("record.json"), json.dumps(asdict(self), indent=1))

    def at(self, phase: Phase, **changes: str | None) -> "Record":
        """Note how far it has come, and write that."""
        record = replace(self, phase=phase, **changes)
        record.save()
        return record


def home() -> Path:
    """Folder of all records; DROPPOS_HOME in place of ~/.droppos."""
    return Path(os.environ.get("DROPPOS_HOME") or "~/.droppos").expanduser() / "launches"


def begin(record: Record) -> Record:
    """Make the record of a new launch.

    Raises:
        ConfigError: If one of this name is there, and still has a job or machines.
    """
    check_free(record)
    home().mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_kept(record) and record.folder.exists():
        shutil.rmtree(record.folder)  # another head has another key, another file, another log
    record.folder.mkdir(mode=0o700, exist_ok=True)
    record = replace(record, started=time.time())
    record.save()
    return record


def check_free(planned: Record) -> None:
    """Refuse a name that a launch of this machine still has, or keeps a cluster of elsewhere.

    Raises:
        ConfigError: With what may be done about it.
    """
    before, name = find(planned.name), planned.name
    if before is None or before.phase == "ended":
        return
    if not before.again:
        raise ConfigError(
            f"there is a launch {name} already, begun {age(before)} ago at "
            f"{_listed(before.place)}; `droppos attach {name}` follows it, `droppos down {name}` "
            "ends it, --name takes another name"
        )
    before.check_place(
        planned.place, f"`droppos down {name}` ends what was kept there, --name takes another name"
    )


def is_kept(planned: Record) -> bool:
    """Tell whether a launch is planned on a cluster that this machine has kept, at that place."""
    before = find(planned.name)
    return before is not None and before.again and before.may_be_at(planned.place)


def find(name: str) -> Record | None:
    """Find a launch of this machine."""
    file = home() / name / "record.json"
    try:
        return _of(json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}); remove what is in its place, and find the "
            "launch again by --on"
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} is damaged ({error}); remove its folder, and find the launch again by --on"
        ) from error


def _of(loaded: Any) -> Record:
    """Make a record of what was written, by this version or by another one.

    Raises:
        TypeError: If it is none, or a field is of a wrong type.
    """
    if not isinstance(loaded, dict):
        raise TypeError(f"a mapping is expected, got {loaded!r}")
    known = {field.name: field.type for field in fields(Record) if field.name in loaded}
    for name, kind in known.items():
        value = loaded[name]
        if get_origin(kind) is Literal:
            fits = value in get_args(kind)
        else:
            fits = isinstance(value, (int, float) if kind is float else cast(type, kind))
        if not fits:
            raise TypeError(f"{name} is {value!r}")
    return Record(**{name: loaded[name] for name in known})


def all_records() -> Iterator[Record]:
    """List the launches of this machine; a record that is damaged is told of, and left out."""
    for file in sorted(home().glob("*/record.json")):
        try:
            record = find(file.parent.name)
        except ConfigError as error:
            _log.warning("%s", error)
            continue
        if record is not None:
            yield record


def note(found: Record, phase: Phase) -> None:
    """Write how far a launch has come; nothing for one that another machine began."""
    kept = find(found.name)
    if kept is not None and found.is_on_disk():
        kept.at(phase)  # with what has been written meanwhile, such as the job


def check_name(name: str) -> None:
    """Refuse what could not be the name of a cluster everywhere.

    Raises:
        ConfigError: If it is not.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"a launch's name has small letters, digits and dashes, at most 50, and begins with a "
            f"letter, got {name!r}; give one with --name"
        )


def _listed(place: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in place.items())


def age(record: Record) -> str:
    """Tell how long ago it was begun."""
    minutes = (time.time() - record.started) / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    part.replace(file)
