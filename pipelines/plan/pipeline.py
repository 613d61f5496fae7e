"""The pipeline as queues, simulated: read, decode, hand on, train, checkpoint.

    windows -> [ storage: one server ] -> [ decode tasks: c servers ] -> in order
            -> [ network to the workers: one server ] -> [ the step: one server ] -> checkpoints

A decode task takes a window, waits for its share of storage, then decodes piece by piece. Pieces
leave in the order of the run, and no window is begun before there is room for it (docs/stream.md),
so whoever is slow holds the others up. A step waits for its batch and for the step before it.

Every queue is first come, first served, and windows begin in the order of the run, so the events
can be taken window by window: when each ends follows from those before. Nothing is drawn but how
long a window and a step take, by seed.
"""

from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import ceil, inf

import numpy as np

from pipelines.readings import SMALL_FLOAT

WARM_UP = 1 / 3
"""Share of the simulated steps that only fill the queues."""
FEWEST_STEPS = 150
ROUNDS = 6
"""Windows that each decode task does in a simulation, at least, where decoding may be the bound."""
CHECKPOINTS = 3
"""That a simulation spans."""
MOST_FOR_CHECKPOINTS = 2000
"""Steps, at most, for that; rarer ones cost next to nothing."""
NEAR = 2.0
"""It may be, if what it could do is less than so many times what the slowest part can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What each part takes of its servers, in seconds."""

    batch: int
    """Pictures of a step."""
    window: int
    """Pictures of a window: whole batches, or a whole fraction of one."""
    tasks: int
    """Windows that are decoded at once."""
    room: int
    """Pictures that may be begun beyond those that were trained on."""
    storage_s: float
    """For which a window holds storage, shared by all tasks."""
    latency_s: float
    """For which a task waits besides, alone: first bytes, its own connection."""
    decode_s: float
    """To decode a window, by one task."""
    hand_s: float
    """For which a batch holds the network into the workers' machines."""
    step_s: float
    """One optimizer step of all workers."""
    cores_s: float = 0.0
    """For which a batch holds all cores, where training and decoding share them; else 0."""
    decode_spread: float = 0.1
    """Relative standard deviation of a window's decoding."""
    step_spread: float = 0.02
    """The same of a step, the slowest worker's."""
    checkpoint_steps: int = 10**9
    """Steps from one checkpoint to the next."""
    blocked_s: float = 0.0
    """For which a checkpoint holds training up."""
    write_s: float = 0.0
    """Until it is complete; the next one waits for that."""

    @property
    def bounds(self) -> dict[str, float]:
        """Pictures per second that each part could do if no other held it up."""
        of_window = {"storage": self.storage_s, "decode": self.latency_s + self.decode_s}
        servers = {"storage": 1, "decode": self.tasks}
        found = {
            part: servers[part] * self.window / seconds
            for part, seconds in of_window.items()
            if seconds > 0
        }
        every = self.checkpoint_steps
        of_batch = {
            "hand-over": self.hand_s,
            "cores": self.cores_s,
            "train": self.step_s + self.blocked_s / every,
            "checkpoints": (self.blocked_s + self.write_s) / every,  # one at a time
        }
        return found | {part: self.batch / s for part, s in of_batch.items() if s > 0}


@dataclass(frozen=True, slots=True)
class Flow:
    """What a simulation found, in its steady state."""

    images_per_s: float
    waiting: float
    """Share of the time in which the workers had nothing to train on."""
    first_s: float
    """Seconds from the start to the first batch."""


def simulate(service: Service, seed: int, steps: int | None = None) -> Flow:
    """Run the pipeline for a while.

    Args:
        service: What each part takes.
        seed: Of the draws.
        steps: Optimizer steps; none takes enough for several windows of every task.
    """
    return _Pipeline(service, seed, steps or _enough(service)).run()


def _enough(service: Service) -> int:
    """Count the steps until the queues are in their steady state, some checkpoints among them."""
    bounds = service.bounds
    steps = max(FEWEST_STEPS, min(CHECKPOINTS * service.checkpoint_steps, MOST_FOR_CHECKPOINTS))
    if bounds.get("decode", inf) > NEAR * min(bounds.values()):
        return steps
    return max(steps, ceil(ROUNDS * service.tasks * service.window / service.batch))


class _Pipeline:
    """When each window, batch and step ends."""

    def __init__(self, service: Service, seed: int, steps: int) -> None:
        self._service = service
        self._steps = steps
        pieces = max(1, service.window // service.batch)
        self._windows = ceil(steps * service.batch / service.window)
        draw = np.random.default_rng(seed)
        decode = _around_one(draw, service.decode_spread, (self._windows, pieces))
        # From a task's start on a window to the end of each of its pieces.
        self._decode: list[list[float]] = (
            service.decode_s / pieces * np.cumsum(decode, axis=1)
        ).tolist()
        self._step = service.step_s * _around_one(draw, service.step_spread, (steps,))
        self._first = int(WARM_UP * steps)
        counted = self._step[self._first + 1 :]
        counted *= service.step_s / max(counted.mean(), SMALL_FLOAT)  # no luck in their mean
        # No more servers than windows: they would never be asked.
        self._free = [0.0] * min(service.tasks, self._windows)
        heapify(self._free)
        self._storage = self._network = self._cores = 0.0
        self._begun: list[float] = []
        self._ended: list[float] = []
        self._complete = 0.0
        self._waited: list[float] = []

    def run(self) -> Flow:
        service, pieces = self._service, len(self._decode[0])
        per_batch = max(1, service.batch // service.window)
        ready = 0.0
        for window in range(self._windows):
            for piece, at in enumerate(self._decoded(window)):
                ready = max(ready, at)  # in order: an early piece waits for those before it
                number = window * pieces + piece
                if (number + 1) % per_batch == 0 and len(self._ended) < self._steps:
                    self._train(ready)
        first = self._first
        seconds = max(self._ended[-1] - self._ended[first], SMALL_FLOAT)
        done = len(self._ended) - 1 - first
        waited = sum(self._waited[first + 1 :])
        return Flow(done * service.batch / seconds, waited / seconds, self._begun[0])

    def _decoded(self, window: int) -> list[float]:
        """Let a task read and decode a window; give when each of its pieces is there."""
        service = self._service
        start = max(self._free[0], self._room_at(window))
        if service.storage_s:
            self._storage = max(start, self._storage) + service.storage_s
            start = self._storage
        start += service.latency_s
        times = [start + piece for piece in self._decode[window]]
        heapreplace(self._free, times[-1])
        return times

    def _room_at(self, window: int) -> float:
        """Find when enough was taken by the workers for one more window to begin."""
        service = self._service
        # At least a batch beside a window: of a step in many micro-batches less is held at once,
        # but then they are taken one by one.
        room = max(service.room, service.window + service.batch)
        over = (window + 1) * service.window - room
        taken = ceil(over / service.batch)
        return self._begun[taken - 1] if taken > 0 else 0.0

    def _train(self, ready: float) -> None:
        service, number = self._service, len(self._ended)
        self._network = max(ready, self._network) + service.hand_s
        before = self._ended[-1] if self._ended else 0.0
        if number and number % service.checkpoint_steps == 0:
            before = max(before, self._complete) + service.blocked_s
            self._complete = before + service.write_s
        start = max(before, self._network)
        self._waited.append(start - before)
        end = start + float(self._step[number])
        if service.cores_s:
            # Decoding and training take turns on the cores: together they cannot be quicker.
            self._cores = max(self._cores + service.cores_s, start)
            end = max(end, self._cores)
        self._begun.append(start)
        self._ended.append(end)


def _around_one(draw: np.random.Generator, spread: float, shape: tuple[int, ...]) -> np.ndarray:
    """Draw factors with a mean of 1, none of them below 0: of a gamma distribution."""
    if spread == 0:
        return np.ones(shape)
    form = spread**-2
    return draw.gamma(form, 1 / form, shape)
