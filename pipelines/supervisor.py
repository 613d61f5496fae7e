"""The supervisor: one group of workers after another, until the last step is done.

It starts a group on the nodes that are there (:mod:`pipelines.crew`), and ends it when it hangs,
when a node is about to go, or when there is room for more workers. Ray Train starts the group,
gives it its process group and its part of the stream, and tells when a worker is lost. What comes
next is decided here, since only here it is known what a checkpoint and a global batch allow.
"""

import logging
import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic, sleep
from typing import Any, cast

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from droppos.errors import (
    ConfigError,
    DivergedError,
    DropposError,
    StorageError,
    TrainingError,
)
from pipelines import checkpoints
from pipelines.attempt import SupersededError
from pipelines.background import in_background, stop_on_signal
from pipelines.cluster import decode_tasks_of, group_share
from pipelines.crew import (
    Advice,
    Room,
    RoomWanted,
    advise,
    best_size,
    send_signal,
    worker_resources,
)
from pipelines.events import Events, Wish
from pipelines.group import Group
from pipelines.heard import Heard
from pipelines.job import Job
from pipelines.order import Schedule
from pipelines.parts import DamagedError
from pipelines.passed import FILE as PASSED_FILE
from pipelines.passed import pass_over
from pipelines.provenance import origin
from pipelines.recipe import Recipe
from pipelines.sharing import ReadWindow, Sharing
from pipelines.source import Remaining, data_config
from pipelines.storage import open_place, will_pass
from pipelines.terminate import ListeningTorch
from pipelines.windows import read_window
from pipelines.worker import train_worker

logger = logging.getLogger(__name__)

RAYS_ADVICE = ("Failed to apply UDF", "This looks like an AWS S3 perm", "To change retry attempts")
"""Lines that Ray Data puts below what went wrong in a task."""
POLL_S = 0.2
"""Seconds between two looks at what the workers said."""
LOOK_S = 1.0
"""Seconds between two looks at the cluster's nodes."""

KILL_EVERY_S = 30.0
"""Seconds after which workers that hang are sent SIGKILL again."""
FEWER_S = 120.0
"""Seconds for which a size that could not start is not tried again."""
AWAY_S = 3600.0
"""Seconds for which storage may be away between two groups; each time it is asked it has
`retries.PATIENCE` besides."""
AGAIN_S = 10.0
"""Seconds until it is asked again."""
UNSTARTED_S, UNSTARTED_AGAIN_S = 60.0, 600.0
"""Seconds without a word of any worker after which that is told, and told again."""
ELASTIC_START_S = 240
"""Seconds in which a group has to start on nodes that are there; else a smaller one is tried. What
a cluster's image sets for nodes that have yet to come is longer."""
START_S = 60.0
"""Seconds after a request to stop in which workers may still start, and save a checkpoint."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a group of workers does; by default, pre-training."""

    loop: Callable[[Job], None] = train_worker
    """Runs on each worker, from the newest checkpoint on."""
    read: ReadWindow = read_window
    """What reads and decodes a window for it."""
    done: Callable[[], bool] = lambda: True
    """Whether all is done, once the last step is in a checkpoint."""


class Supervisor:
    """Runs a recipe to its end."""

    def __init__(
        self,
        recipe: Recipe,
        schedule: Schedule,
        heard: Heard,
        *,
        driver: str,
        stop: Callable[[], bool] = lambda: False,
        sharing: Sharing | None = None,
        work: Work = Work(),
    ) -> None:
        """Take all that is needed; nothing starts yet.

        Args:
            recipe: The run, with all its workers, and a device that is not auto.
            schedule: Its order.
            heard: Takes what workers say, and what is done about them.
            driver: This process, which has claimed the run (:mod:`pipelines.attempt`).
            stop: Asked now and then; once it says yes, the run ends after a checkpoint.
            sharing: Decode together with other trials that read the same.
            work: What the workers do.
        """
        self._sharing = sharing
        self._work = work
        self._recipe = recipe
        self._asked_to_stop = stop
        self._schedule = schedule
        self._heard = heard
        self._on_gpu = recipe.compute.device == "cuda"
        self._home = open_place(recipe.home)
        self._events = Events.start()
        self._driver = driver
        self._origin = origin()  # the workers' own command says nothing
        self._saves = 0
        self._room_wanted = RoomWanted(recipe, self._on_gpu)
        self._noticed: set[str] = set()
        self._stopped = False
        self._stopped_at = 0.0
        self._most: tuple[int, float] | None = None
        self._furthest = 0
        """Newest step that was ever in a checkpoint that counts."""

    def run(self) -> None:
        """Run groups until the last step, a request to stop, or too many failures.

        Raises:
            TrainingError: If the workers failed more often than run.max_failures, or the run was
                taken back more often than run.max_rewinds.
            DropposError: As raised in a worker.
        """
        failures = 0
        abort = threading.Event()
        with closing(self._room_wanted), stop_on_signal(self._stop, abort.set):
            while True:
                self._room_wanted.besides(running=0)
                before = self._await_newest_step(abort)
                size = self._await_room(abort)
                if size is None:
                    return
                self._events.group += 1
                group = Group(self._recipe.run.hang_timeout_s, number=self._events.group)
                self._room_wanted.besides(running=size)
                error = self._run_group(size, group, abort)
                if isinstance(error, DamagedError):
                    self._set_aside(error)
                step = self._await_newest_step(abort)
                if self._heard.too_many is not None:
                    raise self._heard.too_many
                if step > before:
                    failures = 0
                if group.gave_up is not None:
                    self._take_back(group)
                elif error is not None or (step <= before and not self._done(step)):
                    if self._stopped and not group.started:
                        return  # nobody had begun, so there is nothing to keep
                    error = error or TrainingError(
                        "the workers ended without a newer checkpoint, and did not say why"
                    )
                    failures += not self._try_fewer(size, group)
                    self._refuse(error, failures)
                    self._say("lost", error=str(error), step=step)
                if self._stopped or self._done(step):
                    return

    def _done(self, step: int) -> bool:
        """Tell whether a run whose newest checkpoint is of this step has nothing left to do."""
        return step == self._schedule.steps and self._work.done()

    def _set_aside(self, error: DropposError) -> None:
        """Have a checkpoint that workers found damaged count no more, if it is.

        Here and not in a worker: all of it is hashed again, and a group ends with its first worker.
        """
        try:
            checkpoints.set_aside_if_damaged(self._home, str(error))
        except StorageError as away:  # the next group will find it damaged, too
            logger.warning("a damaged checkpoint still counts: %s", away)

    def _refuse(self, error: DropposError, failures: int) -> None:
        """Raise an error that will not pass, or has come too often."""
        if isinstance(error, ConfigError | DivergedError):
            raise error
        if failures > self._recipe.run.max_failures:
            raise type(error)(
                f"{error}; that was {failures} times in a row without a newer checkpoint "
                f"(run.max_failures {self._recipe.run.max_failures}); the newest one is kept, "
                "--resume goes on from it"
            ) from error

    def _try_fewer(self, size: int, group: Group) -> bool:
        """Take a group that could not even start for too large, and try the next size for a while.

        A node may be dead and still be listed, or hold another job: its resources are counted, and
        nobody can have them.

        Returns:
            Whether there is a smaller size; if not, it is a failure as any other.
        """
        smaller = [fewer for fewer in self._recipe.sizes if fewer < size]
        if group.processes or not smaller:
            return False
        self._most = (max(smaller), monotonic() + FEWER_S)
        return True

    @property
    def _room_for(self) -> int | None:
        """Workers that are known to be the most that can start now; None if nothing is known."""
        if self._most is None or monotonic() > self._most[1]:
            return None
        return self._most[0]

    def _leave(self) -> None:
        """Leave the cluster, and with it end the workers.

        A trial is an actor of Tune's, which could not even tell its result without Ray; its
        workers end with it.
        """
        self._room_wanted.close()
        in_trial = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        if not in_trial:
            ray.shutdown()

    def _await_newest_step(self, abort: threading.Event) -> int:
        """Find where the next group begins, however long storage is away, up to an hour.

        Raises:
            StorageError: If it refuses, is away longer, or the run is asked to stop meanwhile.
            TrainingError: If no checkpoint counts any more: a group would begin again at step 0,
                and what the run was is deleted.
        """
        since = monotonic()
        while True:
            try:
                step = self._newest_step()
            except StorageError as error:
                stop = self._stopped or self._asked_to_stop()
                if stop or not will_pass(error) or monotonic() - since > AWAY_S:
                    raise
                self._say("stall", error=f"no workers run, and storage is asked again: {error}")
            else:
                break
            if abort.wait(AGAIN_S):
                raise KeyboardInterrupt
        if self._furthest and not step and (lost := checkpoints.lost(self._home)) is not None:
            raise TrainingError(
                f"no checkpoint of {self._home} counts any more, though step {lost} was saved: "
                "they were deleted, or found damaged (damaged.json in their folders says of which "
                "file); restore one and --resume, or begin again as another run.name"
            )
        self._furthest = max(self._furthest, step)
        return step

    def _newest_step(self) -> int:
        saved = checkpoints.newest(self._home)
        return saved.step if saved else 0

    def _stop(self) -> None:
        """Ask the workers for a last checkpoint; may be called by a signal handler."""
        self._stopped = True
        self._events.wished = Wish(self._saves, leave=2)

    def _waits_in_vain(self) -> bool:
        """Tell whether nobody has started though the run is to stop: there may be no nodes."""
        self._stopped_at = self._stopped_at or monotonic()
        return monotonic() - self._stopped_at > START_S

    def _say(self, kind: str, **told: Any) -> None:
        self._heard.event({"kind": kind, **told})

    def _await_room(self, abort: threading.Event) -> int | None:
        """Choose the size of the next group; None if asked to stop meanwhile.

        A run of a fixed size leaves the waiting to Ray, which has an autoscaler bring nodes.
        """
        if self._recipe.run.min_workers is None:
            stopped = self._stopped or self._asked_to_stop()
            return None if stopped else self._recipe.run.workers
        told = False
        while not (self._stopped or self._asked_to_stop()):
            room = 0
            if (found := self._look_around()) is not None:
                room = found.workers(self._recipe, self._on_gpu)
            if self._room_for is not None:
                room = min(room, self._room_for)
            if (size := best_size(self._recipe, room)) is not None:
                return size
            if not told and found is not None:
                self._say("waiting", workers=min(self._recipe.sizes), fit=room)
                told = True
            if abort.is_set():
                raise KeyboardInterrupt
            sleep(LOOK_S)
        return None

    def _run_group(self, size: int, group: Group, abort: threading.Event) -> DropposError | None:
        """Run one group to its end; return why it failed, if it did."""
        self._saves = 0
        self._tell_workers(Advice())
        self._say("group", workers=size)
        running = in_background(self._trainer(self._recipe.at(size)).fit)
        began = looked = monotonic()
        tell_at = began + UNSTARTED_S
        killed, killed_at = "", 0.0
        try:
            while not running.done():
                if abort.is_set():
                    raise KeyboardInterrupt
                self._heard.drain(self._events, group.event)
                if self._stopped or self._heard.too_many is not None or self._asked_to_stop():
                    self._stop()  # again, for a notice may just have been written over it
                if not group.processes and monotonic() > tell_at:
                    tell_at = monotonic() + UNSTARTED_AGAIN_S
                    self._tell_unstarted(size, monotonic() - began)
                if monotonic() - looked > LOOK_S and group.processes:
                    looked = monotonic()
                    self._look(size, group)
                    self._tell_stall(group)
                    if not killed and (killed := group.hangs):
                        self._say("hang", error=killed)
                    if killed and monotonic() - killed_at > KILL_EVERY_S:
                        killed_at = monotonic()
                        # One that hangs, or is stopped, hears nothing else.
                        send_signal(group.processes.values(), signal.SIGKILL)
                if self._stopped and not group.processes and self._waits_in_vain():
                    self._leave()
                    return None
                sleep(POLL_S)
        except BaseException:
            self._leave()  # whatever went wrong here, workers must not go on by themselves
            raise
        self._heard.drain(self._events, group.event)
        error = running.exception()
        if error is None:
            return None
        # Of Ray, or of storage: what ends Train's own actor, that of no worker, is a failure, too.
        if not isinstance(error, TrainingFailedError | RayError | OSError):
            raise error
        return TrainingError(f"{killed}; they were killed") if killed else cause_of(error)

    def _trainer(self, recipe: Recipe) -> TorchTrainer:
        tasks = decode_tasks_of(recipe, group_share(recipe, crew=self._recipe))
        elastic = self._recipe.run.min_workers is not None
        # It would end a group two minutes after any notice, also one that says no time: `advise`
        # knows when to leave.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        if elastic:
            os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ELASTIC_START_S)
        return TorchTrainer(
            partial(
                self._work.loop,
                Job(recipe, self._schedule, self._events, self._driver, self._origin),
            ),
            datasets={
                "train": Remaining(
                    recipe, self._schedule, tasks, self._sharing, read=self._work.read
                )
            },
            dataset_config=data_config(recipe.data.buffer_mb),
            torch_config=cast(Any, ListeningTorch()),  # only its type is another
            scaling_config=ScalingConfig(
                num_workers=recipe.run.workers,
                use_gpu=self._on_gpu,
                resources_per_worker=worker_resources(recipe, self._on_gpu),
            ),
            run_config=RunConfig(
                name="ray",  # Ray's own bookkeeping; ours is in checkpoints/
                storage_path=self._home.path,
                storage_filesystem=self._home.fs,
                failure_config=FailureConfig(
                    max_failures=0,
                    max_preemption_failures=0,
                    # A group that cannot start may be too large for the nodes that are left.
                    controller_failure_limit=0 if elastic else -1,
                ),
            ),
        )

    def _look(self, size: int, group: Group) -> None:
        """Look at the cluster's nodes, and tell the workers what follows from it."""
        if (room := self._look_around()) is None:
            return
        advice = advise(
            self._recipe,
            gpu=self._on_gpu,
            size=size,
            homes=group.nodes,
            room=room,
            most=self._room_for,
        )
        self._tell_workers(advice)

    def _look_around(self) -> Room | None:
        try:
            return Room.look()
        except RayError as error:
            logger.warning("the cluster's nodes cannot be listed now: %s", error)
            return None

    def _tell_workers(self, advice: Advice) -> None:
        """Pass advice on; a person's wish to stop stands above it."""
        if new := advice.save - self._noticed:
            self._noticed |= new
            self._saves += 1
            self._say("notice", nodes=sorted(new))
        leave = 2 if advice.urgent else bool(advice.leave)
        if leave > self._events.wished.leave:
            self._say("leave", why=advice.leave)
        if not self._stopped:
            self._events.wished = Wish(self._saves, leave)

    def _tell_unstarted(self, size: int, seconds: float) -> None:
        """Tell that no worker was heard of: Ray waits, and tries again, without a word."""
        with suppress(RayError):
            fit = Room.look().workers(self._recipe, self._on_gpu)
            self._say("unstarted", workers=size, seconds=seconds, fit=fit)

    def _tell_stall(self, group: Group) -> None:
        """Tell when nobody gets on, and when somebody does again: storage may be away, say."""
        stalls = group.stalls
        if stalls and not group.stalled:
            self._say("stall", error=stalls)
        group.stalled = bool(stalls)

    def _take_back(self, group: Group) -> None:
        """Note the batches that spoilt the gradient, for the next group to pass over.

        Raises:
            TrainingError: If the run was taken back too often.
            SupersededError: If another driver has taken over.
        """
        assert group.gave_up is not None
        if not group.bad_steps:
            raise SupersededError(group.gave_up)
        assert self._recipe.data.path is not None
        data = open_place(self._recipe.data.path)
        passed = pass_over(self._home, data, self._schedule, group.bad_steps)
        self._say("rewind", why=group.gave_up, steps=group.bad_steps, rewinds=passed.rewinds)
        if passed.rewinds > self._recipe.run.max_rewinds:
            raise TrainingError(
                f"{group.gave_up}; the run was taken back to its newest checkpoint "
                f"{self._recipe.run.max_rewinds} times (run.max_rewinds) and it did not help: "
                f"the pictures of those steps are named in {self._home / PASSED_FILE}; look at "
                f"them, lower optim.lr_per_256 ({self._recipe.optim.lr_per_256:g}), or train in "
                "compute.precision=float32"
            )


def cause_of(error: BaseException) -> DropposError:
    """Find our own error in what ended a group; of several workers the others saw a peer go."""
    failures = list(getattr(error, "worker_failures", {}).values())
    failures.append(getattr(error, "controller_failure", error))
    for failure in failures:
        link: BaseException | None = failure
        while link is not None:
            if isinstance(link, DropposError):
                return link
            link = getattr(link, "cause", None) or link.__cause__
    first = failures[0]
    said = [line for line in str(first).strip().splitlines() if not line.startswith(RAYS_ADVICE)]
    reason = said[-1] if said else ""
    kind = type(first)
    if not (kind.__module__.startswith("ray.") or kind is RuntimeError):
        reason = f"{kind.__name__}: {reason}"  # of itself a text may say little
    if re.search("gloo|nccl", reason, re.IGNORECASE):  # not what to look into
        reason = "a connection between two of them was closed, as when one dies"
    return TrainingError(f"the workers failed: {reason.strip()}")
