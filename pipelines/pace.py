"""The pace of training: images and operations per second, and the time spent waiting."""

from time import perf_counter

from pipelines.stream import Batch


class Pace:
    """What was done since the last log, and for which share of the time there was nothing to do."""

    def __init__(self, global_batch: int, flops: float, peak: float) -> None:
        """Start the clock.

        Args:
            global_batch: Images of a step, of all workers.
            flops: Operations of one image's step (:mod:`droppos.flops`).
            peak: Operations per second of matrix products that all workers' devices can do.
        """
        self._global_batch = global_batch
        self._flops = flops
        self._peak = peak
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._started = self._paused_at = perf_counter()
        self._steps = 0
        self._waited = 0.0
        self.replaced = 0
        """Pictures of this rank that could not be decoded and were replaced."""

    def count(self, group: list[Batch]) -> None:
        """Count a step and what it waited for."""
        self._steps += 1
        self._waited += sum(batch.waited for batch in group)
        self.replaced += sum(len(batch.problems) for batch in group)
        self._paused_at = perf_counter()

    def pause(self) -> None:
        """Leave the time since the last step, spent on a checkpoint or a measurement, out."""
        self._started += perf_counter() - self._paused_at
        self._paused_at = perf_counter()

    @property
    def images_per_s(self) -> float:
        """Images of all workers."""
        return self._steps * self._global_batch / self._elapsed

    @property
    def flops_per_s(self) -> float:
        """Model FLOPs per second of all workers."""
        return self.images_per_s * self._flops

    @property
    def mfu(self) -> float:
        """Share of what the devices could do, 0 to 1, waiting included."""
        return self.flops_per_s / self._peak

    @property
    def wait_fraction(self) -> float:
        """Share of the time in which this rank had nothing to train on, 0 to 1."""
        return self._waited / self._elapsed

    @property
    def _elapsed(self) -> float:
        return max(perf_counter() - self._started, 1e-9)
