"""A group of workers as the driver knows it: from what each says of itself, twice a second."""

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

STALL_S = 30.0
"""Seconds without any progress after which it is told, if that is less than a quarter of
run.hang_timeout_s."""


class Group:
    """What the driver knows of the workers that are running, from what they say."""

    def __init__(
        self, hang_timeout_s: float, now: Callable[[], float] = monotonic, number: int = 0
    ) -> None:
        self.number = number
        """Stands in the events of its workers; others' are not heard."""
        self._hang_timeout_s = hang_timeout_s
        self._now = now
        self._moved = now()
        self._doing: dict[int, tuple[str, int, int]] = {}
        self._heard: dict[int, float] = {}
        self.processes: dict[int, tuple[str, int]] = {}
        """Node and process of each rank."""
        self.started = False
        """Whether a worker has begun to train."""
        self.stalled = False
        """Whether nobody has got on for a while."""
        self.gave_up: str | None = None
        """Why the workers ended, all at once, where starting them again would not help."""
        self.bad_steps: list[int] = []
        """Steps to be passed over, if that is why."""

    @property
    def nodes(self) -> set[str]:
        """Where the workers are."""
        return {node for node, _ in self.processes.values()}

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event."""
        if event["group"] != self.number:
            return
        match event["kind"]:
            case "started":
                self.started = True
                self._moved = self._now()
            case "beat":
                # From the first on, so that one that freezes before it has started is found, too.
                self.processes[event["rank"]] = (event["node"], event["pid"])
                doing = (event["doing"], event["step"], event["moves"])
                if self._doing.get(event["rank"]) != doing:
                    self._moved = self._now()
                self._doing[event["rank"]] = doing
                self._heard[event["rank"]] = self._now()
            case "gave_up":
                self.gave_up = event["error"]
                self.bad_steps = event["bad_steps"]

    @property
    def hangs(self) -> str:
        """Describe who hangs and where; empty while somebody gets on, or nobody has begun."""
        still = self._still(self._hang_timeout_s)
        return f"{still} (hang_timeout_s {self._hang_timeout_s:g})" if still else ""

    @property
    def stalls(self) -> str:
        """Describe the same, when it is too early to call it a hang."""
        return self._still(min(STALL_S, self._hang_timeout_s / 4))

    def _still(self, longest_s: float) -> str:
        now = self._now()
        if not self._doing or now - self._moved < longest_s:
            return ""
        silent = [rank for rank, at in self._heard.items() if now - at > max(20, longest_s / 2)]
        doing = ", ".join(
            f"worker {rank} {what} at step {step}"
            for rank, (what, step, _) in sorted(self._doing.items())
        )
        mute = f"; nothing was heard of worker {', '.join(map(str, silent))}" if silent else ""
        return f"no worker got on for {now - self._moved:.0f} s: {doing}{mute}"
