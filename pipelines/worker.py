"""The worker's loop: next batch, step, maybe log, maybe checkpoint, maybe measure.

Every rank runs this. Where it starts is decided by storage alone: the newest complete
checkpoint, which the stream's factory (:class:`pipelines.source.Remaining`) reads alike.
"""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from math import isfinite

import ray
import ray.train
import torch
import torch.distributed as dist

from droppos.errors import DataError, StorageError
from droppos.flops import guide_flops, matmul_peak, step_flops
from droppos.parallel import guide_dtype
from droppos.step import MicroBatch, StepReport, TrainState, train_step
from pipelines import stored_state
from pipelines.asked import Ear
from pipelines.attempt import SupersededError, claim_for_group
from pipelines.bad_steps import BadSteps, TooManyBadSteps
from pipelines.events import Event, Events
from pipelines.facts import facts
from pipelines.holdout import Holdout
from pipelines.job import Job
from pipelines.keeper import Keeper
from pipelines.kept_state import kept_state, restore
from pipelines.machine import device_name
from pipelines.order import Schedule
from pipelines.pace import Pace
from pipelines.passed import PassedOver
from pipelines.proof import Proof, pictures_begun
from pipelines.pulse import Pulse
from pipelines.recipe import Recipe
from pipelines.start import load_start, started_from
from pipelines.stream import Batch, batches

FLUSH_S = 10
"""Seconds a worker waits, at its end, for its last events to arrive."""


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
    saved = stored_state.newest_for_all(job.home, state.device)
    pace = Pace(recipe.optim.global_batch, step_flops(recipe.model, recipe.method), peak_of(state))
    init_from = started_from(saved, job.home, recipe.run.init_from)
    if saved is None and init_from is not None:
        load_start(state, job.home)
    restore(state, saved)
    passed = PassedOver.read(job.home, schedule)
    begun = pictures_begun(saved, schedule)
    ids = recipe.run.record_ids
    proof = Proof.begin(attempt, schedule, state.step, begun, state.device, record_ids=ids)
    ear = Ear(job.events, recipe.run.hang_timeout_s)
    keeper = Keeper(job, state.device, proof, saved, pulse.moved)
    known = facts(recipe, schedule.manifest, init_from)
    job.events.send(started(state.step, state.device))

    stream = steps_from(state.step, recipe, schedule)
    aside = recipe.aside_cpus > 0  # then the driver has each such checkpoint measured
    holdout = None if aside else open_holdout(job, state)
    pace.reset()
    bad = BadSteps(recipe.run.bad_steps)
    leave = False
    pulse.now("waiting for pictures", state.step)
    for group in stream:
        pulse.now("training", state.step)
        proof.count(group)  # before the step: what is not of the schedule is not trained on
        if state.step in passed.steps:
            state.step += 1
            report = None
        else:
            report = train_step(state, [micro_batch(batch) for batch in group])
            bad.note(state.step - 1, report.skipped)
        pace.count(group)
        tell_skipped(job.events, group)

        asked = ear.hear(keeper.ended)
        leave = asked.leave
        last = state.step == schedule.steps
        measured = last or at_epoch(state, recipe.measure.every_epochs)
        due = last or leave or asked.save or state.step % recipe.run.checkpoint_every == 0
        due |= aside and measured
        if report and (due or state.step % recipe.run.log_every == 0):
            log(job, proof, state, report, pace, bad)
        elif due:  # a step that was passed over has nothing to log; those before it count
            read_bad_steps(job, bad)
        if bad.too_many:
            break
        keeper.finish_if(asked.ended)
        metrics = {}
        if holdout and measured:
            pulse.now("measuring", state.step)
            metrics = measure(job, proof, state, holdout)
            pace.pause()
        if due:
            pulse.now("saving", state.step)
            bad.forgive()
            leave |= asked.leave_after_next
            keeper.begin(
                state.step,
                partial(kept_state, state),
                {
                    **known,
                    "metrics": metrics,
                    "random_states": dist.get_world_size(),
                    "random_devices": sorted({"cpu", state.device.type}),
                },
            )
            pace.pause()
        if leave:
            break
        pulse.now("waiting for pictures", state.step)
    pulse.now("saving", state.step)
    ear.close()
    keeper.finish(last=not bad.too_many)  # the newest good one is what a rewind goes back to
    keeper.close()
    bad.refuse()


def open_holdout(job: Job, state: TrainState) -> Holdout | None:
    """Read the held-out pictures, on all ranks; where one cannot, none measures, and all train.

    Raises:
        DataError: If they cannot be read, and decide which checkpoint is kept.
    """
    holdout, problem = None, ""
    try:
        holdout = Holdout.open(job.recipe, state.device)
    except DataError as error:
        # Storage that is away comes back, as for the pictures to train on.
        if isinstance(error, StorageError) or job.recipe.run.keep_best is not None:
            raise
        problem = str(error)
    rank, world = dist.get_rank(), dist.get_world_size()
    lacks = torch.tensor(rank if problem else world, device=state.device)
    dist.all_reduce(lacks, dist.ReduceOp.MIN)
    if lacks == world:
        return holdout
    if lacks == rank:  # one tells, for all
        error = f"{problem}; nothing is measured until that is mended, and the workers start again"
        job.events.send({"kind": "not_measured", "step": state.step, "error": error})
    return None


def started(step: int, device: torch.device) -> Event:
    """Tell the driver that this worker is there: from here its time costs, on that hardware."""
    return {
        "kind": "started",
        "step": step,
        "rank": dist.get_rank(),
        "workers": dist.get_world_size(),
        "pid": os.getpid(),
        "device": device_name(device),
        "node": ray.get_runtime_context().get_node_id(),
    }


def peak_of(state: TrainState) -> float:
    """Measure what all workers' devices together could do, each part in its own precision."""
    half = state.compute.precision == "bf16"
    own = matmul_peak(state.device, torch.bfloat16 if half else torch.float32)
    guide = guide_dtype(state.compute, state.device) if state.method.guided else None
    if guide is not None:
        flops = step_flops(state.model_config, state.method)
        guided = guide_flops(state.model_config, state.method)
        own = flops / ((flops - guided) / own + guided / matmul_peak(state.device, guide))
    return own * dist.get_world_size()


def micro_batch(batch: Batch) -> MicroBatch:
    """Hand over what a step needs of a batch."""
    return MicroBatch(batch.images, batch.slots, batch.mirrored)


def tell_skipped(events: Events, group: list[Batch]) -> None:
    """Tell the driver of pictures that another stood in for; there are none on most steps."""
    for batch in group:
        if batch.problems:
            event = {"kind": "skipped", "step": batch.step + 1, "problems": batch.problems}
            events.send(event)


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


def log(
    job: Job, proof: Proof, state: TrainState, report: StepReport, pace: Pace, bad: BadSteps
) -> None:
    """Average over ranks and tell the driver.

    The one place where a step waits for the device, and on logged steps only.
    """
    row = [*report.metrics, report.grad_norm.to(state.device)]
    own = torch.tensor([pace.wait_fraction, pace.replaced], device=state.device)
    values = torch.cat([torch.stack([value.float() for value in row]), own.float()])
    dist.all_reduce(values)
    world = dist.get_world_size()
    numbers = (values / world).tolist()
    metrics = dict(zip(report.metrics._fields, numbers, strict=False))
    grad_norm, wait_fraction, replaced = numbers[len(metrics) :]
    read_bad_steps(job, bad)
    if dist.get_rank() == 0:
        values = {
            "train/loss": metrics["loss"],
            "train/grad_norm": grad_norm,
            "train/lr": report.lr,
            "train/epoch": state.epoch,
            "train/skipped_steps": len(bad.steps),
            "data/images_per_s": pace.images_per_s,
            "compute/model_tflops_per_s": pace.flops_per_s / 1e12,
            "compute/mfu": pace.mfu,
            "data/wait_fraction": wait_fraction,
            "data/pictures_replaced": replaced * world,
        }
        if state.method.predicts_positions:
            values |= {
                "train/position_loss_nats": metrics["position_loss"],
                "train/position_excess_nats": metrics["position_excess"],
                "train/position_accuracy": metrics["position_accuracy"],
                "train/carrying_patches": metrics["carrying"],
                "train/sigma_patches": report.sigma,
            }
        if state.method.predicts_pixels:
            values["train/pixel_loss"] = metrics["pixel_loss"]
        if state.method.ignore_confident:
            values["train/ignored_fraction"] = metrics["ignored"]
        # A skipped step has no loss to speak of; what it did is in train/skipped_steps.
        values = {name: value for name, value in values.items() if isfinite(value)}
        proof.tell(job.events, state.step, values)
    pace.reset()


def read_bad_steps(job: Job, bad: BadSteps) -> None:
    """Wait for the device, and tell the driver which steps were skipped since the last time."""
    skipped = bad.read()
    if skipped and dist.get_rank() == 0:
        job.events.send({"kind": "bad_steps", "steps": skipped})


def measure(job: Job, proof: Proof, state: TrainState, holdout: Holdout) -> dict[str, float]:
    """Measure on the held-out pictures, all ranks together, and tell the driver."""
    values = holdout.measure(state.model)
    if dist.get_rank() == 0:
        proof.tell(job.events, state.step, values)
    return values


def at_epoch(state: TrainState, every: int) -> bool:
    """Tell whether a step has just ended an epoch that is to be measured."""
    return state.step % (every * state.steps_per_epoch) == 0


def steps_from(step: int, recipe: Recipe, schedule: Schedule) -> Iterator[list[Batch]]:
    """Give this worker's micro-batches of each step until the run's last, from Ray's stream."""
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None
    stream = batches(
        shard,
        worker_batch=recipe.worker_batch,
        start_step=step,
        stop_step=schedule.steps,
        accumulate=recipe.optim.accumulate,
    )
    return grouped(stream, recipe.optim.accumulate)


def grouped(stream: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Gather the micro-batches of each step."""
    group: list[Batch] = []
    for batch in stream:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
