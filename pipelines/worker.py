"""The worker's loop: next batch, step, maybe log, maybe checkpoint, maybe measure.

Every rank runs this. Where it starts is decided by storage alone: the newest complete
checkpoint, which the stream's factory (:mod:`pipelines.pretrain`) reads alike.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from time import perf_counter
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from droppos.errors import DropposError, TrainingError
from droppos.parallel import precision, unwrap
from droppos.step import MicroBatch, StepReport, TrainState, train_step
from pipelines import checkpoints
from pipelines.agreement import Agreement
from pipelines.attempt import SupersededError, claim_for_group
from pipelines.checkpoints import Retention
from pipelines.events import Events, Wish
from pipelines.facts import facts
from pipelines.holdout import Holdout
from pipelines.order import Schedule
from pipelines.parts import DamagedError
from pipelines.passed import PassedOver
from pipelines.proof import Proof
from pipelines.pulse import Pulse
from pipelines.recipe import Recipe
from pipelines.saver import Done, Saver
from pipelines.storage import Place, open_place
from pipelines.stream import Batch, batches
from pipelines.terminate import asked_to_terminate

FLUSH_S = 10
"""Seconds a worker waits, at its end, for its last events to arrive."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker of a run is told."""

    recipe: Recipe
    """The run, with as many workers as this group has."""
    schedule: Schedule
    events: Events
    driver: str
    """Name of the driver's attempt, see :mod:`pipelines.attempt`."""

    @property
    def home(self) -> Place:
        """Folder of the run."""
        return open_place(self.recipe.home)


def train_worker(job: Job) -> None:
    """Train from the newest checkpoint to the last step, or until asked to leave.

    What all ranks found at once, and starting again as it is would only repeat, ends here:
    another driver has taken the run over, or too many steps had to be skipped.
    """
    rank = dist.get_rank()
    with Pulse(job.events, rank) as pulse:
        try:
            _train(job, pulse)
        except (SupersededError, TooManyBadSteps) as error:
            if rank == 0:
                steps = error.steps if isinstance(error, TooManyBadSteps) else []
                job.events.send({"kind": "gave_up", "error": str(error), "bad_steps": steps})
    job.events.flush(FLUSH_S)


def _train(job: Job, pulse: Pulse) -> None:
    torch.set_num_threads(job.recipe.run.cpus_per_worker)
    recipe, schedule = job.recipe, job.schedule
    state = create_state(recipe, schedule.steps_per_epoch)
    attempt = claim_for_group(job.home, job.driver, state.device)  # nobody else adds one now
    saved = checkpoints.newest(job.home)
    restore(state, saved)
    passed = PassedOver.read(job.home)
    proof = Proof.begin(attempt, schedule, saved, recipe.run.record_ids, state.device)
    agreement = Agreement(3, recipe.run.hang_timeout_s)
    keeper = Keeper(job, state, proof)
    job.events.send(
        {
            "kind": "started",
            "step": state.step,
            "rank": dist.get_rank(),
            "workers": dist.get_world_size(),
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
        }
    )

    shard = ray.train.get_dataset_shard("train")
    assert shard is not None
    stream = batches(
        shard,
        worker_batch=recipe.worker_batch,
        start_step=state.step,
        stop_step=schedule.steps,
        accumulate=recipe.optim.accumulate,
    )
    holdout = Holdout.open(recipe, state.device)
    pace = Pace(recipe.optim.global_batch)
    bad = BadSteps(recipe.run.bad_steps)
    saves = 0
    leave = False
    pulse.now("waiting for pictures", state.step)
    for group in grouped(stream, recipe.optim.accumulate):
        pulse.now("training", state.step)
        proof.count(group)  # before the step: what is not of the schedule is not trained on
        if state.step in passed.steps:
            state.step += 1
            report = None
        else:
            report = train_step(state, [micro_batch(batch) for batch in group])
            bad.note(state.step - 1, report.skipped)
        pace.count(group)
        tell_skipped(job, group)

        wish = job.events.wish() if dist.get_rank() == 0 else Wish()
        heard = agreement.settle(wish.saves, max(wish.leave, 2 * asked_to_terminate()), keeper.due)
        last = state.step == schedule.steps
        leave = heard[1] > 1
        due = last or leave or heard[0] > saves or state.step % recipe.run.checkpoint_every == 0
        saves = max(saves, heard[0])
        if report and (due or state.step % recipe.run.log_every == 0):
            log(job, state, report, pace, bad)
        if heard[2]:
            keeper.finish()
        metrics = {}
        if holdout and (last or at_epoch(state, recipe.measure.every_epochs)):
            pulse.now("measuring", state.step)
            metrics = measure(job, state, holdout)
            pace.pause()
        if due:
            pulse.now("saving", state.step)
            bad.refuse()  # what is kept is what a rewind goes back to
            leave |= heard[1] > 0
            keeper.begin(metrics)
            pace.pause()
        if leave:
            break
        pulse.now("waiting for pictures", state.step)
    pulse.now("saving", state.step)
    agreement.close()
    keeper.finish()
    keeper.close()


def micro_batch(batch: Batch) -> MicroBatch:
    """Hand over what a step needs of a batch."""
    return MicroBatch(batch.images, batch.slots, batch.mirrored)


def tell_skipped(job: Job, group: list[Batch]) -> None:
    """Tell the driver of pictures that another stood in for; there are none on most steps."""
    for batch in group:
        if batch.problems:
            event = {"kind": "skipped", "step": batch.step + 1, "problems": batch.problems}
            job.events.send(event)


class TooManyBadSteps(TrainingError):  # noqa: N818
    """All ranks skipped too many steps since the last checkpoint."""

    def __init__(self, steps: Sequence[int], limit: int) -> None:
        self.steps = list(steps)
        """Steps, counted from 0, whose batch made the gradient NaN or infinite."""
        super().__init__(
            f"the gradient was NaN or infinite in {len(steps)} steps since the last checkpoint "
            f"({', '.join(map(str, self.steps[:5]))}{', ...' * (len(steps) > 5)}), run.bad_steps "
            f"allows {limit}"
        )


class BadSteps:
    """Steps since the last checkpoint that changed nothing, for their gradient was not finite.

    Whether a step was skipped stays on the device until a step is logged.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._unread: list[tuple[int, Tensor]] = []
        self.steps: list[int] = []

    def note(self, step: int, skipped: Tensor) -> None:
        """Take note of a step; waits for no device."""
        self._unread.append((step, skipped))

    def read(self) -> list[int]:
        """Wait for the device, and return which steps were skipped since the last call."""
        if not self._unread:
            return []
        flags = torch.stack([skipped for _, skipped in self._unread]).tolist()
        found = [step for (step, _), flag in zip(self._unread, flags, strict=True) if flag]
        self._unread.clear()
        self.steps += found
        return found

    def refuse(self) -> None:
        """Begin anew for the next checkpoint.

        Raises:
            TooManyBadSteps: On all ranks, if there were more than the limit.
        """
        self.read()
        if len(self.steps) > self._limit:
            raise TooManyBadSteps(self.steps, self._limit)
        self.steps.clear()


def create_state(recipe: Recipe, steps_per_epoch: int) -> TrainState:
    """Make model and optimizer at step 0."""
    return TrainState.create(
        recipe.model,
        recipe.method,
        recipe.optim,
        recipe.compute,
        seed=recipe.run.seed,
        steps_per_epoch=steps_per_epoch,
    )


def restore(state: TrainState, saved: checkpoints.Saved | None) -> None:
    """Put a checkpoint's weights, moments, step and random state into this rank's, at any size.

    Raises:
        DamagedError: On all ranks, if a file is not what was written; it counts no more then.
    """
    if saved is None:
        return
    model, optimizer = get_state_dict(state.model, state.optimizer)
    kept: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if dist.get_rank() < saved.record.get("random_states", 0):
        kept |= random_state(state.device)
    try:
        checkpoints.load(saved, kept)
    except DamagedError as error:
        if dist.get_rank() == 0:
            checkpoints.set_aside(saved, str(error))
        raise
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    for name, value in kept.items():
        if name.startswith("random"):
            torch.set_rng_state(value["cpu"])
            if "cuda" in value:
                torch.cuda.set_rng_state(value["cuda"], state.device)
    state.step = saved.step
    # The optimizer's settings are the recipe's, not the checkpoint's: --allow-changes may differ.
    decays = (state.optim.weight_decay, 0.0)
    for group, decay in zip(state.optimizer.param_groups, decays, strict=True):
        group |= {"weight_decay": decay, "betas": state.optim.betas}


def random_state(device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Take this rank's generators. Nothing draws from them today: masks and crops have their own.

    Returns:
        Under a key of the rank's own, for each rank keeps and finds only its own.
    """
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return {f"random-{dist.get_rank():05d}": state}


class Keeper:
    """Makes a run's checkpoints, and tells the driver of each when it counts."""

    def __init__(self, job: Job, state: TrainState, proof: Proof) -> None:
        run = job.recipe.run
        self._job = job
        self._state = state
        self._proof = proof
        self._blocked = 0.0
        self._saver = Saver(
            job.home,
            Retention(
                run.keep_checkpoints, run.keep_every, run.keep_best, run.keep_best_is == "smallest"
            ),
            state.device,
            may_write=proof.attempt.check,
            timeout_s=max(run.hang_timeout_s, 600),
        )

    @property
    def due(self) -> bool:
        """Whether all ranks should soon `finish`: this one's part is done."""
        return self._saver.due

    def begin(self, metrics: dict[str, float]) -> None:
        """Copy the state; every rank calls this. Waits for the checkpoint before it, if need be.

        Args:
            metrics: Of the held-out pictures at this step, if they were measured.
        """
        started = perf_counter()
        self.finish()
        job, state = self._job, self._state
        model, optimizer = get_state_dict(state.model, state.optimizer)
        cursor = {**asdict(job.schedule.position(state.step)), "step": state.step}
        pictures, write_ids = self._proof.settle(state.step)
        self._saver.begin(
            state.step,
            {"model": model, "optimizer": optimizer, **random_state(state.device)},
            {
                "cursor": {**cursor, "pictures": pictures},
                **facts(job.recipe, job.schedule.manifest),
                "metrics": metrics,
                "world_size": dist.get_world_size(),
                "random_states": dist.get_world_size(),
            },
            beside=write_ids,
        )
        self._blocked = perf_counter() - started

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one; every rank calls this.

        Raises:
            DropposError: On all ranks, if it failed for good.
        """
        try:
            done = self._saver.finish()
        except DropposError:
            self._proof.concluded(counts=False)
            raise
        if done is None:
            return
        self._proof.concluded(counts=done.saved is not None)
        if dist.get_rank() == 0:
            self._tell(done)

    def _tell(self, done: Done) -> None:
        send = self._job.events.send
        if done.saved is None:
            send({"kind": "not_saved", "error": done.error})
            return
        step = done.saved.step
        send({"kind": "checkpoint", "step": step, "saved": done.saved})
        values = {
            "checkpoint/blocked_s": self._blocked,
            "checkpoint/write_s": done.seconds,
            "checkpoint/size_mb": done.saved.size / 1e6,
        }
        send({"kind": "metrics", "step": step, "values": values})

    def close(self) -> None:
        """Let go of host memory."""
        self._saver.close()


def log(job: Job, state: TrainState, report: StepReport, pace: "Pace", bad: BadSteps) -> None:
    """Average over ranks and tell the driver.

    The one place where a step waits for the device, and on logged steps only.

    Raises:
        TooManyBadSteps: On all ranks, if more steps than run.bad_steps had to be skipped.
    """
    row = [*report.metrics, report.grad_norm.to(state.device)]
    own = torch.tensor([pace.wait_fraction, pace.replaced], device=state.device)
    values = torch.cat([torch.stack([value.float() for value in row]), own.float()])
    dist.all_reduce(values)
    world = dist.get_world_size()
    numbers = (values / world).tolist()
    metrics = dict(zip(report.metrics._fields, numbers, strict=False))
    grad_norm, wait_fraction, replaced = numbers[len(metrics) :]
    skipped = bad.read()
    if dist.get_rank() == 0:
        values = {
            "train/loss": metrics["loss"],
            "train/grad_norm": grad_norm,
            "train/lr": report.lr,
            "train/epoch": state.epoch,
            "train/skipped_steps": len(bad.steps),
            "data/images_per_s": pace.images_per_s,
            "data/wait_fraction": wait_fraction,
            "data/pictures_replaced": replaced * world,
        }
        if state.method.predicts_positions:
            values |= {
                "train/position_loss_nats": metrics["position_loss"],
                "train/position_excess_nats": metrics["position_excess"],
                "train/position_accuracy": metrics["position_accuracy"],
                "train/sigma_patches": report.sigma,
            }
        if state.method.predicts_pixels:
            values["train/pixel_loss"] = metrics["pixel_loss"]
        if state.method.ignore_confident:
            values["train/ignored_fraction"] = metrics["ignored"]
        # A skipped step has no loss to speak of; what it did is in train/skipped_steps.
        values = {name: value for name, value in values.items() if isfinite(value)}
        job.events.send({"kind": "metrics", "step": state.step, "values": values})
        if skipped:
            job.events.send({"kind": "bad_steps", "steps": skipped})
    if len(bad.steps) > job.recipe.run.bad_steps:
        bad.refuse()
    pace.reset()


def measure(job: Job, state: TrainState, holdout: Holdout) -> dict[str, float]:
    """Measure on the held-out pictures, all ranks together, and tell the driver."""
    with precision(state.compute, state.device):
        report = holdout.measure(state.model, unwrap(state.model).grid)
    values = {f"holdout/{name}": value for name, value in report.metrics().items()}
    if dist.get_rank() == 0:
        job.events.send({"kind": "metrics", "step": state.step, "values": values})
    return values


def at_epoch(state: TrainState, every: int) -> bool:
    """Tell whether a step has just ended an epoch that is to be measured."""
    return state.step % (every * state.steps_per_epoch) == 0


def grouped(stream: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Gather the micro-batches of each step."""
    group: list[Batch] = []
    for batch in stream:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


class Pace:
    """Images per second, and the share of time spent waiting for them, since the last log."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
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
    def wait_fraction(self) -> float:
        """Share of the time in which this rank had nothing to train on, 0 to 1."""
        return self._waited / self._elapsed

    @property
    def _elapsed(self) -> float:
        return max(perf_counter() - self._started, 1e-9)
