"""What workers say, on its way to the ledger and to whoever listens."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from droppos.errors import DataError
from pipelines.aside import Aside
from pipelines.cost import HOURS, Cost
from pipelines.events import Event, Events
from pipelines.ledger import Ledger
from pipelines.machine import over_nodes
from pipelines.news import told
from pipelines.provenance import workers_hardware
from pipelines.skipped import FILE, Skipped

_log = logging.getLogger(__name__)

OnEvent = Callable[[Mapping[str, Any]], None]
"""Told of each event in order, in the driver: a live line, a Tune report."""


class Heard:
    """Takes what workers say to the ledger and to whoever listens."""

    def __init__(
        self,
        ledger: Ledger,
        skipped: Skipped,
        price_per_hour: float | None,
        on_event: OnEvent | None,
        aside: Aside | None = None,
    ) -> None:
        """Listen; nothing is asked of anybody yet.

        Args:
            ledger: Keeps the metrics.
            skipped: Keeps the pictures that were skipped.
            price_per_hour: What one worker costs an hour; None if that is not known.
            on_event: Told of each event, too.
            aside: Measures checkpoints; None where the workers do.
        """
        self._ledger = ledger
        self._skipped = skipped
        hours = ledger.last_value(HOURS) or 0.0 if ledger.reached else None
        self._cost = Cost(hours, price_per_hour)
        self._on_event = on_event
        self._workers: dict[int, Event] = {}
        self._machines: dict[str, Mapping[str, float]] = {}
        self._aside = aside
        self._away = False
        self._counted = 0
        self.last: dict[str, float] = {}
        """Last value of each metric."""
        self.tested: Sequence[int] | None = None
        """Held-out pictures that a fine-tuned classifier has right, has right among its first five,
        and was asked; None until it was."""

    @property
    def too_many(self) -> DataError | None:
        """Why the run must end, once too many pictures had to be skipped."""
        return self._skipped.too_many

    def drain(self, events: Events, also: OnEvent) -> None:
        """Take all that has arrived, and pass it on to the supervisor, too."""
        for event in events.drain():
            also(event)
            if event["kind"] != "beat":
                self.event(event)
        if self._ledger.away != self._away:
            self._away = self._ledger.away
            self.event({"kind": "ledger_away" if self._away else "ledger_back"})
        if self._aside is not None:
            for event in self._aside.look():
                self.event(event)
        self.keep_skipped()

    def conclude(self, wait: bool) -> None:
        """End measuring aside: after the last checkpoint is measured, or at once."""
        if self._aside is not None:
            for event in self._aside.finish() if wait else self._aside.cancel():
                self.event(event)

    def keep_skipped(self, *, last: bool = False) -> None:
        """Bring the list of skipped pictures up to date, in storage and in MLflow.

        Args:
            last: There is no later, whatever ends the run.
        """
        if self._skipped.write(last=last):
            self._ledger.text(FILE, self._skipped.text())

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event."""
        match event["kind"]:
            case "started":
                self._begin(event)
            case "waiting":
                self._cost.hold(0)  # there are too few machines, and none works
            case "machine":
                self._machines[event["node"]] = event["values"]
                return  # nobody else wants to know
            case "metrics":
                values = {**event["values"], **self._own(event["values"])}
                self.last |= values
                self._ledger.log(event["step"], values, event.get("time_ms"))
            case "skipped":
                self._skipped.add(event["step"], event["problems"])
            case "tested":
                self.tested = event["counts"]
            case "checkpoint":
                self._ledger.checkpoint(event["saved"])
                if self._aside is not None:
                    self._aside.offer(event["saved"])
        if self._on_event is not None:
            self._on_event(event)
        elif (news := told(event)) is not None:
            _log.warning("%s", news)

    def _begin(self, event: Event) -> None:
        """Learn that a worker of a group is there; rank by rank, in any order."""
        if event["rank"] in self._workers:  # of a new group
            self._workers.clear()
            self._machines.clear()
        self._workers[event["rank"]] = event
        if len(self._workers) == event["workers"]:
            self._cost.hold(event["workers"])
            self._ledger.tag(workers_hardware(self._workers.values()))

    def _own(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add what only the driver knows.

        With rank 0's metrics, whose steps only grow: what one rank tells of a step may come after
        what another tells of the next, and the ledger takes no step twice.
        """
        if "train/loss" not in values:
            return {}
        own = self._cost.metrics() | over_nodes(self._machines.values())
        if len(self._skipped) != self._counted:
            self._counted = len(self._skipped)
            own["data/pictures_skipped"] = self._counted
        return own
