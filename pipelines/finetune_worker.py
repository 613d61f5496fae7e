"""The worker's loop of fine-tuning: next batch, step, maybe log, maybe save; in the end, test.

Every rank runs this. As in pre-training, where it starts is decided by storage alone.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from droppos.errors import DataError, DivergedError
from droppos.measure.finetune import (
    FinetuneState,
    Labelled,
    build_classifier,
    count_right,
    finetune_step,
)
from droppos.measure.finetune_recipe import Finetune
from droppos.parallel import resolve_device
from pipelines import stored_state
from pipelines.asked import Ear
from pipelines.attempt import SupersededError, claim_for_group
from pipelines.checkpoints import Saved
from pipelines.extraction import decode, pieces_of
from pipelines.holdout import choose
from pipelines.job import Job
from pipelines.keeper import Keeper
from pipelines.pace import Pace
from pipelines.proof import Proof
from pipelines.pulse import Pulse
from pipelines.recipe_file import plain
from pipelines.shards import load_manifest
from pipelines.storage import open_place
from pipelines.stream import Batch
from pipelines.worker import FLUSH_S, started, steps_from, tell_skipped

TEST_BATCH = 64
"""Pictures of a forward pass."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What every worker is told besides its job, whose recipe has model, stream and places."""

    finetune: Finetune
    classes: Sequence[str]
    """Their names."""
    facts: Mapping[str, Any]
    """What a checkpoint depends on."""
    held: Sequence[Any]
    """A reference to the encoder's weights and each row's label, in a list: fetched by the worker
    itself, or every message to it would carry them."""


def finetune_worker(tuning: Tuning, job: Job) -> None:
    """Fine-tune from the newest checkpoint to the last step, then classify held-out pictures."""
    rank = dist.get_rank()
    with Pulse(job.events, rank) as pulse:
        try:
            _finetune(tuning, job, pulse)
        except SupersededError as error:  # found by all ranks at once; the others would repeat it
            if rank == 0:
                job.events.send({"kind": "gave_up", "error": str(error), "bad_steps": []})
    job.events.flush(FLUSH_S)


def _finetune(tuning: Tuning, job: Job, pulse: Pulse) -> None:
    recipe, schedule = job.recipe, job.schedule
    torch.set_num_threads(recipe.run.cpus_per_worker)
    weights, labels = ray.get(tuning.held[0])
    state = _create(tuning, job, weights)
    attempt = claim_for_group(job.home, job.driver, state.device)  # nobody else adds one now
    saved = stored_state.newest_for_all(job.home, state.device)
    _restore(state, saved)
    begun = schedule.position(state.step).batch * schedule.global_batch
    proof = Proof.begin(attempt, schedule, state.step, begun, state.device)
    keeper = Keeper(job, state.device, proof, saved, pulse.moved)
    ear = Ear(job.events, recipe.run.hang_timeout_s)
    job.events.send(started(state.step, state.device))
    pace = Pace(recipe.optim.global_batch, 0, 1)
    leave = False
    pulse.now("waiting for pictures", state.step)
    for group in steps_from(state.step, recipe, schedule):
        pulse.now("training", state.step)
        proof.count(group)  # before the step: what is not of the schedule is not trained on
        loss = finetune_step(state, [labelled(batch, labels) for batch in group])
        pace.count(group)
        tell_skipped(job.events, group)
        asked = ear.hear(keeper.ended)
        last = state.step == schedule.steps
        due = last or asked.leave or asked.save or state.step % recipe.run.checkpoint_every == 0
        due |= state.step % schedule.steps_per_epoch == 0
        if due or state.step % recipe.run.log_every == 0:
            _log(job, proof, state, loss, pace)
        keeper.finish_if(asked.ended)
        if due:
            pulse.now("saving", state.step)
            _save(tuning, job, state, keeper)
            pace.pause()
        leave = not last and due and asked.leave_after_next
        if leave:
            break
        pulse.now("waiting for pictures", state.step)
    pulse.now("saving", state.step)
    ear.close()
    keeper.finish(last=True)
    keeper.close()
    if not leave:
        _test(job, state, pulse)


def labelled(batch: Batch, labels: Int64[Tensor, " rows"]) -> Labelled:
    """Give a batch its labels.

    Another picture stands in for one that could not be had, under the number of that one: its label
    would be wrong. Another good one of the batch takes the place, with its own.

    Raises:
        DataError: If none of its pictures could be had.
    """
    good = [i for i, row in enumerate(batch.rows.tolist()) if row not in batch.problems]
    if len(good) == len(batch.rows):
        return Labelled(batch.images, labels[batch.rows], batch.mirrored)
    if not good:
        raise DataError(
            f"none of the {len(batch.rows)} pictures of a micro-batch can be had; the first of "
            f"them: {next(iter(batch.problems.values()))}; restore the shards, or prepare the data "
            "set again"
        )
    taken = torch.arange(len(batch.rows))
    for place, row in enumerate(batch.rows.tolist()):
        if row in batch.problems:
            taken[place] = good[place % len(good)]
    return Labelled(batch.images[taken], labels[batch.rows[taken]], batch.mirrored[taken])


def _create(tuning: Tuning, job: Job, weights: Mapping[str, Tensor]) -> FinetuneState:
    recipe, classes = job.recipe, len(tuning.classes)
    device = resolve_device(recipe.compute)
    model = build_classifier(weights, recipe.model, classes, tuning.finetune, recipe.run.seed)
    return FinetuneState.create(
        tuning.finetune,
        DistributedDataParallel(model.to(device)),
        classes,
        compute=recipe.compute,
        steps_per_epoch=job.schedule.steps_per_epoch,
        device=device,
        seed=recipe.run.seed,
        rank=dist.get_rank(),
    )


def _restore(state: FinetuneState, saved: Saved | None) -> None:
    if saved is None:
        return
    model, optimizer = get_state_dict(state.model, state.optimizer)
    stored_state.load(saved, {"model": model, "optimizer": optimizer})
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    state.step = saved.step


def _save(tuning: Tuning, job: Job, state: FinetuneState, keeper: Keeper) -> None:
    """Begin a checkpoint, all ranks together."""

    def kept() -> dict[str, Any]:
        model, optimizer = get_state_dict(state.model, state.optimizer)
        return {"model": model, "optimizer": optimizer}

    keeper.begin(
        state.step,
        kept,
        {"finetune": dict(tuning.facts), "classifier": _described(tuning, job)},
    )


def _described(tuning: Tuning, job: Job) -> dict[str, Any]:
    """Tell what model a checkpoint's weights are of."""
    return {"model": plain(asdict(job.recipe.model)), "classes": list(tuning.classes)}


def _log(job: Job, proof: Proof, state: FinetuneState, loss: Tensor, pace: Pace) -> None:
    """Average over ranks and tell the driver: where a step waits for the device."""
    mean = mean_loss(loss, state.step)
    if dist.get_rank() == 0:
        values = {
            "train/loss": mean,
            "train/lr": max(group["lr"] for group in state.optimizer.param_groups),
            "train/epoch": state.epoch,
            "data/images_per_s": pace.images_per_s,
            "data/wait_fraction": pace.wait_fraction,
        }
        proof.tell(job.events, state.step, values)
    pace.reset()


def mean_loss(loss: Tensor, step: int) -> float:
    """Average over ranks, on all of them; before a checkpoint is made of what diverged.

    Raises:
        DivergedError: On all ranks, if it is not finite.
    """
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    value = mean.item() / dist.get_world_size()
    if not isfinite(value):
        raise DivergedError(
            f"the loss was {value} at or before step {step}: the fine-tuning diverged; begin again "
            "under another --name with a lower --optim.lr-per-256, more --optim.warmup-epochs, an "
            "--optim.clip-norm, or --precision float32"
        )
    return value


def _test(job: Job, state: FinetuneState, pulse: Pulse) -> None:
    """Classify all held-out pictures, each by one rank, and tell the driver the counts."""
    assert job.recipe.data.holdout is not None
    place = open_place(job.recipe.data.holdout)
    manifest = load_manifest(place)
    counts = torch.zeros(3, dtype=torch.int64, device=state.device)
    seen = 0
    with ThreadPoolExecutor(job.recipe.run.cpus_per_worker) as threads:
        for piece in pieces_of(choose(manifest))[dist.get_rank() :: dist.get_world_size()]:
            pulse.now(f"testing after {seen} pictures", state.step)
            rows, pixels = decode(place, manifest, piece, job.recipe.model.image_size, threads)
            labels = torch.tensor([row.label for row in rows])
            parts = zip(pixels.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True)
            for images, truth in parts:
                counts[:2] += count_right(state, images, truth)
            seen += len(rows)
    counts[2] = seen
    dist.all_reduce(counts)
    if dist.get_rank() == 0:
        job.events.send({"kind": "tested", "counts": counts.tolist()})
