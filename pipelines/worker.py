"""The worker's loop: next batch, step, maybe log, maybe checkpoint, maybe measure.

Every rank runs this. Where it starts is decided by storage alone: the newest complete
checkpoint, which the stream's factory (:mod:`pipelines.pretrain`) reads alike.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from time import perf_counter

import ray.train
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from droppos.errors import TrainingError
from droppos.parallel import precision, unwrap
from droppos.step import MicroBatch, StepReport, TrainState, train_step
from pipelines import checkpoints
from pipelines.attempt import SupersededError, claim_for_group
from pipelines.events import Events
from pipelines.facts import facts
from pipelines.holdout import Holdout
from pipelines.order import Schedule
from pipelines.proof import Proof
from pipelines.recipe import Recipe
from pipelines.storage import Place, open_place
from pipelines.stream import Batch, batches

FLUSH_S = 10
"""Seconds a worker waits, at its end, for its last events to arrive."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker of a run is told."""

    recipe: Recipe
    schedule: Schedule
    events: Events
    driver: str
    """Name of the driver's attempt, see :mod:`pipelines.attempt`."""

    @property
    def home(self) -> Place:
        """Folder of the run."""
        return open_place(self.recipe.home)


def train_worker(job: Job) -> None:
    """Train from the newest checkpoint to the last step, or until asked to stop.

    A run that diverged, or that another driver has taken over, ends here, on all ranks at once:
    raising would have Ray start the same again, run.max_failures times.
    """
    try:
        _train(job)
    except (DivergedError, SupersededError) as error:
        if dist.get_rank() == 0:
            job.events.send({"kind": "failed", "error": str(error)})
    job.events.flush(FLUSH_S)


def _train(job: Job) -> None:
    torch.set_num_threads(job.recipe.run.cpus_per_worker)
    recipe, schedule = job.recipe, job.schedule
    state = create_state(recipe, schedule.steps_per_epoch)
    attempt = claim_for_group(job.home, job.driver, state.device)  # nobody else adds one now
    saved = checkpoints.newest(job.home)
    restore(state, saved)
    proof = Proof.begin(attempt, schedule, saved, recipe.run.record_ids, state.device)
    job.events.send(
        {
            "kind": "started",
            "step": state.step,
            "rank": dist.get_rank(),
            "workers": dist.get_world_size(),
            "pid": os.getpid(),
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
    for group in grouped(stream, recipe.optim.accumulate):
        proof.count(group)  # before the step: what is not of the schedule is not trained on
        report = train_step(state, [micro_batch(batch) for batch in group])
        pace.count(group)
        tell_skipped(job, group)

        last = state.step == schedule.steps
        due = last or state.step % recipe.run.checkpoint_every == 0
        stop = False
        if due or state.step % recipe.run.log_every == 0:
            stop = log(job, state, report, pace)  # also refuses to keep what is not finite
        if holdout and (last or at_epoch(state, recipe.measure.every_epochs)):
            measure(job, state, holdout)
            pace.pause()
        if due or stop:
            save(job, state, proof)  # last: once it counts, nothing of this step is done again
            pace.pause()
        if stop:
            return


def micro_batch(batch: Batch) -> MicroBatch:
    """Hand over what a step needs of a batch."""
    return MicroBatch(batch.images, batch.slots, batch.mirrored)


def tell_skipped(job: Job, group: list[Batch]) -> None:
    """Tell the driver of pictures that another stood in for; there are none on most steps."""
    for batch in group:
        if batch.problems:
            event = {"kind": "skipped", "step": batch.step + 1, "problems": batch.problems}
            job.events.send(event)


class DivergedError(TrainingError):
    """All ranks found, in the same step, what starting them again would only repeat."""


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
    """Put a checkpoint's weights, moments and step into the state, at this world size."""
    if saved is None:
        return
    model, optimizer = get_state_dict(state.model, state.optimizer)
    checkpoints.load(saved, {"model": model, "optimizer": optimizer})
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    state.step = saved.step
    # The optimizer's settings are the recipe's, not the checkpoint's: --allow-changes may differ.
    decays = (state.optim.weight_decay, 0.0)
    for group, decay in zip(state.optimizer.param_groups, decays, strict=True):
        group |= {"weight_decay": decay, "betas": state.optim.betas}


def save(job: Job, state: TrainState, proof: Proof) -> None:
    """Write a checkpoint of all ranks, and tell the driver."""
    started = perf_counter()
    model, optimizer = get_state_dict(state.model, state.optimizer)
    cursor = {**asdict(job.schedule.position(state.step)), "step": state.step}
    with proof.committing(state.step) as pictures:
        saved = checkpoints.save(
            job.home,
            state.step,
            {"model": model, "optimizer": optimizer},
            {
                "cursor": {**cursor, "pictures": pictures},
                **facts(job.recipe, job.schedule.manifest),
                "world_size": dist.get_world_size(),
            },
            job.recipe.run.keep_checkpoints,
            may_write=proof.attempt.check,
        )
    if dist.get_rank() == 0:
        seconds = perf_counter() - started
        job.events.send({"kind": "checkpoint", "step": state.step, "saved": saved})
        values = {"checkpoint/blocked_s": seconds, "checkpoint/size_mb": saved.size / 1e6}
        job.events.send({"kind": "metrics", "step": state.step, "values": values})


def log(job: Job, state: TrainState, report: StepReport, pace: "Pace") -> bool:
    """Average over ranks, tell the driver, and learn whether the run is asked to stop.

    The one place where a step waits for the device, and on logged steps only. Whether to stop
    travels with the metrics, so all ranks leave at the same step.

    Raises:
        TrainingError: If the loss is not finite.
    """
    wanted = job.events.stop_requested() if dist.get_rank() == 0 else False
    row = [*report.metrics, report.grad_norm.to(state.device)]
    own = torch.tensor([pace.wait_fraction, pace.replaced, wanted], device=state.device)
    values = torch.cat([torch.stack([value.float() for value in row]), own.float()])
    dist.all_reduce(values)
    world = dist.get_world_size()
    numbers = (values / world).tolist()
    metrics = dict(zip(report.metrics._fields, numbers, strict=False))
    grad_norm, wait_fraction, replaced, stop = numbers[len(metrics) :]
    if not (isfinite(metrics["loss"]) and isfinite(grad_norm)):
        raise DivergedError(
            f"at step {state.step} the loss is {metrics['loss']} and the gradient's norm "
            f"{grad_norm}, expected finite numbers; lower optim.lr_per_256 "
            f"({state.optim.lr_per_256:g}), or train in compute.precision=float32"
        )
    if dist.get_rank() == 0:
        values = {
            "train/loss": metrics["loss"],
            "train/grad_norm": grad_norm,
            "train/lr": report.lr,
            "train/epoch": state.epoch,
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
        job.events.send({"kind": "metrics", "step": state.step, "values": values})
    pace.reset()
    return stop > 0


def measure(job: Job, state: TrainState, holdout: Holdout) -> None:
    """Measure on the held-out pictures, all ranks together, and tell the driver."""
    with precision(state.compute, state.device):
        report = holdout.measure(state.model, unwrap(state.model).grid)
    if dist.get_rank() == 0:
        values = {f"holdout/{name}": value for name, value in report.metrics().items()}
        job.events.send({"kind": "metrics", "step": state.step, "values": values})


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
