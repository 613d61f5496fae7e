"""Training in this process: the steps of `pretrain` and `finetune`, without Ray around them.

The order of the pictures, their crops, the masks, the steps and the checkpoints are those of the
jobs (a test compares the losses); only who reads and who waits is another. Many small trainings
on a machine of two cores are twice as fast so: Ray Data's executor alone takes half a core there,
however small the pictures are, and two processes of one thread need not agree on anything.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64, UInt8
from ray.data import DataIterator
from ray.data.block import BlockAccessor
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from droppos.config import Compute, Method, Model
from droppos.errors import TrainingError
from droppos.measure.finetune import FinetuneState, build_classifier, count_right, finetune_step
from droppos.measure.finetune_recipe import Finetune
from droppos.measure.intervals import Proportion
from droppos.step import train_step
from pipelines import checkpoints, stored_state
from pipelines.facts import check_resume, facts
from pipelines.finetune import read_labels
from pipelines.finetune_worker import labelled
from pipelines.groundwork import located, plan
from pipelines.kept_state import kept_state, restore
from pipelines.order import Schedule
from pipelines.parts import DamagedError
from pipelines.recipe import Data, Recipe, Run
from pipelines.shards import load_manifest
from pipelines.source import crop_options
from pipelines.storage import Place, open_place
from pipelines.stream import Batch, batches
from pipelines.windows import CropOptions, pieces_left, read_window
from pipelines.worker import create_state, micro_batch

TEST_BATCH = 250
"""Pictures of a forward pass that classifies."""

OnLoss = Callable[[int, float], None]
"""Told now and then of a step, and the mean loss since it was last told."""


@dataclass(frozen=True, slots=True)
class _Windows:
    """What Ray Data's iterator would be: whole batches of a schedule, from a step on."""

    schedule: Schedule
    data: Place
    crop: CropOptions
    start_step: int

    def iter_batches(self, *, batch_size: int, **_: Any) -> Iterator[dict[str, np.ndarray]]:
        epoch = self.start_step // self.schedule.steps_per_epoch
        epochs = range(epoch, self.schedule.epochs)
        read = partial(read_window, data=self.data, crop=self.crop, global_batch=batch_size)
        for window, start in pieces_left(self.schedule, self.start_step, epochs):
            for block in read(window, start, block=batch_size):
                columns = BlockAccessor.for_block(block).to_batch_format("numpy")
                yield cast(dict[str, np.ndarray], columns)


def stream(recipe: Recipe, schedule: Schedule, start_step: int) -> Iterator[Batch]:
    """Read the batches of a run that are left, each of them whole."""
    path = recipe.data.path
    assert path is not None
    windows = _Windows(schedule, open_place(path), crop_options(recipe), start_step)
    return batches(
        cast(DataIterator, windows),
        worker_batch=recipe.optim.global_batch,
        start_step=start_step,
        stop_step=schedule.steps,
    )


def pretrain_here(recipe: Recipe, on_loss: OnLoss = lambda step, loss: None) -> checkpoints.Saved:
    """Run, or go on with, a pre-training in this process, on as many threads as torch has.

    Args:
        recipe: Of one worker that does not accumulate.
        on_loss: Told at every `run.log_every` steps.

    Raises:
        ConfigError: If the run's checkpoint is of another recipe or of other data.
        DataError: If data or storage cannot be read.
        TrainingError: If the loss is not finite for a whole `run.log_every`; single steps are
            skipped.
    """
    recipe = located(recipe)
    assert recipe.run.workers == recipe.optim.accumulate == 1
    schedule = plan(recipe)
    home = open_place(recipe.home)
    with _one_rank():
        state = create_state(recipe, schedule.steps_per_epoch)
        saved = checkpoints.newest(home)
        check_resume(recipe, schedule, saved, resume=True, allow_changes=False)
        try:
            restore(state, saved)
        except DamagedError as error:  # whoever begins again goes on from the one before
            checkpoints.set_aside_if_damaged(home, str(error))
            raise
        losses: list[Tensor] = []
        for batch in stream(recipe, schedule, state.step):
            report = train_step(state, [micro_batch(batch)])
            losses.append(report.metrics.loss)
            if state.step % recipe.run.log_every == 0:
                on_loss(state.step, _mean(losses, state.step))
                losses.clear()
            if state.step == schedule.steps or state.step % recipe.run.checkpoint_every == 0:
                known = {
                    "cursor": {"step": state.step},
                    **facts(recipe, schedule.manifest),
                }
                saved = stored_state.save(
                    home,
                    state.step,
                    kept_state(state),
                    known,
                    checkpoints.Retention(recipe.run.keep_checkpoints),
                )
    assert saved is not None
    return saved


@dataclass(frozen=True, slots=True)
class Classifier:
    """What a fine-tuning gave."""

    model: VisionTransformer
    accuracy: Proportion
    """Held-out pictures classified right."""


def finetune_here(
    encoder: VisionTransformer,
    model: Model,
    data: str,
    test: tuple[UInt8[Tensor, "P rows columns 3"], Int64[Tensor, " P"]],
    finetune: Finetune,
    *,
    seed: int,
    device: torch.device,
    on_loss: OnLoss = lambda step, loss: None,
) -> Classifier:
    """Fine-tune an encoder in this process, and classify the test pictures with the result.

    Args:
        encoder: To start from; it stays as it is.
        model: Its configuration.
        data: Labelled prepared data set.
        test: Pictures to classify, with their classes.
        finetune: How; its `augment` must be empty, for crops are made by the same thread.
        seed: Of the head, the order, the crops and all that is drawn.
        device: Where it is trained.
        on_loss: Told at the end of each epoch.
    """
    assert not finetune.augment
    compute = Compute(strategy="single", precision="float32")
    recipe = Recipe(
        model=model,
        method=Method(mask_ratio=0),  # of no weight here
        optim=finetune.optim,
        compute=compute,
        data=Data(path=data, crop_scale=finetune.crop_scale),
        run=Run(seed=seed),
    )
    schedule = plan(recipe)
    place = open_place(data)
    manifest = load_manifest(place)
    labels = read_labels(place, manifest)
    assert manifest.classes is not None
    classes = len(manifest.classes)
    classifier = build_classifier(encoder.state_dict(), model, classes, finetune, seed).to(device)
    state = FinetuneState.create(
        finetune,
        classifier,
        classes,
        compute=compute,
        steps_per_epoch=schedule.steps_per_epoch,
        device=device,
        seed=seed,
    )
    losses: list[Tensor] = []
    for batch in stream(recipe, schedule, 0):
        losses.append(finetune_step(state, [labelled(batch, labels)]))
        if state.step % schedule.steps_per_epoch == 0:
            on_loss(state.step, _mean(losses, state.step))
            losses.clear()
    pictures, truth = test
    right = sum(
        int(count_right(state, images, own)[0])
        for images, own in zip(pictures.split(TEST_BATCH), truth.split(TEST_BATCH), strict=True)
    )
    return Classifier(classifier.eval(), Proportion(right, len(truth)))


def _mean(losses: list[Tensor], step: int) -> float:
    values = torch.stack([loss.detach() for loss in losses])
    mean = float(values[values.isfinite()].mean())
    if not np.isfinite(mean):
        raise TrainingError(
            f"the loss was {mean} at or before step {step}; lower optim.lr_per_256, or warm up "
            "for longer"
        )
    return mean


@contextmanager
def _one_rank() -> Iterator[None]:
    """Be a process group of one: checkpoints are written by all ranks of one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
