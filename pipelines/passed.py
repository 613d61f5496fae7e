"""Batches that a run passes over: they made the gradient NaN or infinite, and it was taken back.

HOME/passed_over.json    how often the run was taken back, the steps, and their pictures' keys
"""

import json
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pipelines.order import Schedule
from pipelines.shards import Manifest, read_row_group
from pipelines.storage import Place
from pipelines.tally import Plan

FILE = "passed_over.json"


@dataclass(frozen=True, slots=True)
class PassedOver:
    """What a run has left out so far."""

    rewinds: int = 0
    """Times it was taken back."""
    steps: frozenset[int] = field(default_factory=frozenset)
    """Steps that are not trained on: their batch is taken, and nothing moves."""

    @classmethod
    def read(cls, home: Place, schedule: Schedule) -> "PassedOver":
        """Read what is noted in a run's folder; nothing, if it speaks of another schedule's steps.

        Raises:
            DataError: If storage refuses.
        """
        if not (home / FILE).exists():
            return cls()
        record = json.loads((home / FILE).read_bytes())
        if record["schedule"] != _name(schedule):
            return cls()
        return cls(record["rewinds"], frozenset(map(int, record["pictures"])))


def pass_over(home: Place, data: Place, schedule: Schedule, steps: Sequence[int]) -> PassedOver:
    """Note a rewind, and whose pictures will be passed over; the driver calls this.

    Raises:
        DataError: If storage refuses.
    """
    before = PassedOver.read(home, schedule)
    record: dict[str, Any] = {
        "schedule": _name(schedule),
        "rewinds": before.rewinds + 1,
        "pictures": {},
    }
    if before.rewinds:
        record["pictures"] = json.loads((home / FILE).read_bytes())["pictures"]
    plan = Plan(schedule)
    for step in sorted(steps):
        record["pictures"][str(step)] = keys_of(data, schedule.manifest, plan.rows(step).tolist())
    (home / FILE).write_bytes(json.dumps(record, indent=1).encode() + b"\n")
    return PassedOver.read(home, schedule)


def _name(schedule: Schedule) -> dict[str, Any]:
    """Tell what decides which pictures a step has."""
    return {
        "manifest": schedule.manifest.digest,
        "seed": schedule.seed,
        "global_batch": schedule.global_batch,
        "window": schedule.window,
    }


def keys_of(data: Place, manifest: Manifest, rows: Sequence[int]) -> list[str]:
    """Read the keys of pictures by their row ids, in ascending order of these."""
    starts = [group.start for group in manifest.groups]
    found: list[str] = []
    for number, members in groupby(sorted(rows), lambda row: bisect(starts, row) - 1):
        group = manifest.groups[number]
        table = read_row_group(data, manifest.shards[group.shard], group.group, ["key"])
        keys = table.column("key").to_pylist()
        found += [keys[row - group.start] for row in members]
    return found
