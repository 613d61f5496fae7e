"""What a run costs: hours of its workers, and their price if it is known."""

from collections.abc import Callable
from time import monotonic

HOURS, PRICE = "cost/worker_hours", "cost/price"


class Cost:
    """Counts the time that workers are held, over every start of the run.

    A worker counts from its group's start until the group has gone, whether it trains, waits or
    loads a checkpoint: that is what a cloud charges for. Groups that follow each other within a
    process leave no gap, unless they wait for machines; nor is the time counted before the first
    worker is there.
    """

    def __init__(
        self,
        hours: float | None,
        price_per_hour: float | None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Go on from what earlier starts of the run held.

        Args:
            hours: That, in worker-hours; None if it is not known, and nothing is told then.
            price_per_hour: What one worker costs an hour; None if that is not known.
            clock: Seconds that pass.
        """
        self._hours = hours
        self._price = price_per_hour
        self._clock = clock
        self._workers = 0
        self._since = 0.0

    def hold(self, workers: int) -> None:
        """Learn how many workers the run holds from now on."""
        self._count()
        self._workers = workers

    def metrics(self) -> dict[str, float]:
        """Tell the hours until now, and their price."""
        self._count()
        if self._hours is None:
            return {}
        values = {HOURS: self._hours}
        if self._price is not None:
            values[PRICE] = self._hours * self._price
        return values

    def _count(self) -> None:
        now = self._clock()
        if self._hours is not None:
            self._hours += self._workers * (now - self._since) / 3600
        self._since = now
