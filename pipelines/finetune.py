"""Fine-tuning a backbone on labelled pictures, on Ray: what it is worth as a start.

The stream is the pre-training's, exact and resumable, with the published augmentation where it
decodes (:mod:`pipelines.augmented`); labels go by the number of each picture. Workers hold whole
copies of the model (DDP), under the pre-training's supervisor: the newest checkpoint is where lost
workers, others than before, or `--resume` go on.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import ray
import torch
from jaxtyping import Int64
from torch import Tensor

from droppos.config import Heads, Method
from droppos.errors import ConfigError, DataError
from droppos.measure.finetune_recipe import Finetune
from droppos.measure.intervals import Proportion
from pipelines import checkpoints, history
from pipelines.augmented import rand_augment, read_augmented
from pipelines.backbone import Backbone, open_backbone
from pipelines.cluster import connect
from pipelines.driver import driving
from pipelines.extraction import heads_of
from pipelines.facts import classes_apart, require_not_lost
from pipelines.finetune_run import FinetuneRun
from pipelines.finetune_worker import Tuning, finetune_worker
from pipelines.groundwork import located, plan
from pipelines.heard import OnEvent
from pipelines.order import Schedule
from pipelines.recipe import Recipe, Tracking
from pipelines.recipe_file import plain
from pipelines.shards import Manifest, load_manifest, read_row_group
from pipelines.storage import Place, open_place, open_reachable
from pipelines.supervisor import Work
from pipelines.windows import read_window
from pipelines.words import counted

_log = logging.getLogger(__name__)

READERS = 16
"""Row groups whose labels are asked of storage at once."""


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What a fine-tuning came to."""

    home: str
    step: int
    """Of the newest checkpoint; 0 without one."""
    steps: int
    """That the whole run has."""
    tracking_run: str
    """Identifier of the MLflow run."""
    top_1: Proportion | None = None
    """Held-out pictures classified right; None if it was stopped before."""
    top_5: Proportion | None = None
    """Those whose class is among the five likeliest; None where there are not more than five."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done and the held-out pictures classified."""
        return self.top_1 is not None

    def metrics(self) -> dict[str, float]:
        """Name the figures for a ledger, each with its 95 % interval; none if it was stopped."""
        figures = {} if self.top_1 is None else self.top_1.metrics("finetune/accuracy")
        if self.top_5 is not None:
            figures |= self.top_5.metrics("finetune/top_5_accuracy")
        return figures


def finetune(
    backbone: str,
    data: str,
    holdout: str,
    recipe: Finetune,
    run: FinetuneRun,
    *,
    tracking: Tracking,
    resume: bool = False,
    heads: Heads = Heads(),  # noqa: B008 - frozen
    on_event: OnEvent | None = None,
) -> Finetuned:
    """Fine-tune a backbone, and classify held-out pictures with the result.

    Ctrl-C or SIGTERM asks the workers for one more checkpoint and ends the run there; a second one
    ends it at once.

    Args:
        backbone: Export, checkpoint or run.
        data: Labelled prepared data set to train on.
        holdout: Labelled prepared data set to classify at the end.
        recipe: How it is fine-tuned.
        run: Name, storage and workers.
        tracking: Where MLflow is.
        resume: Go on from the newest checkpoint of run.storage/run.name, if there is one.
        heads: Attention heads, for weights of another project that don't tell.
        on_event: Hears of progress.

    Raises:
        ConfigError: If it cannot be run here, or is not the run that is to go on.
        DataError: If data or storage cannot be read, or labels are missing.
        TrainingError: If the workers failed more often than run.max_failures.
    """
    trained = open_backbone(backbone, heads)
    if recipe.augment:  # here, or the tasks that decode would be the first to refuse it
        rand_augment(recipe.augment, min(trained.model.image_size))
    whole = located(
        Recipe(
            model=trained.model,
            method=trained.method or Method(mask_ratio=0),  # of no weight here
            optim=recipe.optim,
            compute=run.compute,
            data=run.data(data, holdout, recipe.crop_scale),
            run=run.run,
            tracking=tracking,
        )
    )
    _require_pairs(recipe, whole)
    schedule = plan(whole)
    labels, classes = _labels(whole, schedule.manifest)
    facts = _facts(trained, recipe, whole, schedule)
    home = open_reachable(whole.home)
    saved = checkpoints.newest(home)
    _check_resume(whole, saved, facts, resume)
    connect(whole)
    with driving(whole, schedule, saved, resume=resume, on_event=on_event) as driver:
        described = {f"finetune.{name}": str(value) for name, value in asdict(recipe).items()}
        driver.ledger.tag({**described, "finetune.backbone": trained.uri})
        tuning = Tuning(
            finetune=recipe,
            classes=classes,
            facts=facts,
            held=[ray.put((trained.encoder.state_dict(), labels))],
        )
        read = partial(read_augmented, augment=recipe.augment) if recipe.augment else read_window
        heard = driver.heard
        driver.train(
            Work(partial(finetune_worker, tuning), read, done=lambda: heard.tested is not None)
        )
        newest = checkpoints.newest(home)
        done = Finetuned(
            whole.home, newest.step if newest else 0, schedule.steps, driver.ledger.run_id,
            *_accuracies(heard.tested, len(classes)),
        )  # fmt: skip
        if done.finished:
            driver.ledger.log(schedule.steps, done.metrics())
            history.keep_late(home, schedule.steps, done.metrics())
        driver.ledger.finish("FINISHED" if done.finished else "KILLED")
    return done


def _accuracies(
    tested: Sequence[int] | None, classes: int
) -> tuple[Proportion | None, Proportion | None]:
    if tested is None:
        return None, None
    hits, among_five, total = tested
    return Proportion(hits, total), Proportion(among_five, total) if classes > 5 else None


def _require_pairs(recipe: Finetune, whole: Recipe) -> None:
    for size in whole.sizes if recipe.mixes else ():
        at = whole.at(size)
        if at.worker_batch % 2:
            raise ConfigError(
                f"mixup and cutmix blend images in pairs, but a worker's micro-batch has "
                f"{at.worker_batch} (optim.global_batch {at.optim.global_batch} over "
                f"{counted(size, 'worker')} x optim.accumulate {at.optim.accumulate}); make it even"
                + (f", or min_workers more than {size}" if size < whole.run.workers else "")
            )


def _labels(recipe: Recipe, manifest: Manifest) -> tuple[Int64[Tensor, " rows"], tuple[str, ...]]:
    """Read the label of every picture, by its number.

    Raises:
        DataError: If some have none, or the held-out pictures have other classes.
    """
    assert recipe.data.path is not None and recipe.data.holdout is not None
    held_out = load_manifest(open_place(recipe.data.holdout))
    if not manifest.classes or len(manifest.classes) < 2 or manifest.classes != held_out.classes:
        ours, theirs = classes_apart(manifest.classes, held_out.classes)
        raise DataError(
            f"classes of {recipe.data.path}: {ours}; of {recipe.data.holdout}: {theirs}; both must "
            "have the same two or more, in the same order: prepare them from folders with the same "
            "sub-folders"
        )
    labels = read_labels(open_place(recipe.data.path), manifest)
    tested = read_labels(open_place(recipe.data.holdout), held_out)
    for uri, found in ((recipe.data.path, labels), (recipe.data.holdout, tested)):
        if missing := int((found < 0).sum()):
            raise DataError(
                f"{missing} of {len(found)} pictures of {uri} have no label; prepare it from a "
                "folder in which every picture is in a class's sub-folder"
            )
    if lie_by_class(labels):
        _log.warning(
            "the pictures of %s lie by class, so a batch is of few of them, which costs accuracy: "
            "prepare the folder or archive anew, which mixes them, or raise --window (%d), "
            "which mixes that many",
            recipe.data.path,
            recipe.data.window,
        )
    return labels, manifest.classes


def lie_by_class(labels: Int64[Tensor, " rows"]) -> bool:
    """Tell whether neighbours are of one class far oftener than pictures that are mixed."""
    alike = float((labels[1:] == labels[:-1]).double().mean())
    by_chance = float((labels.bincount().double() / len(labels)).square().sum())
    return alike > (1 + by_chance) / 2


def read_labels(place: Place, manifest: Manifest) -> Int64[Tensor, " rows"]:
    """Read the label of every picture, by its number; -1 for one without."""

    def read(number: int) -> list[int]:
        group = manifest.groups[number]
        table = read_row_group(place, manifest.shards[group.shard], group.group, ["label"])
        return [-1 if label is None else label for label in table["label"].to_pylist()]

    with ThreadPoolExecutor(READERS) as pool:
        groups = pool.map(read, range(len(manifest.groups)))
        return torch.tensor([label for group in groups for label in group])


def _facts(
    trained: Backbone, recipe: Finetune, whole: Recipe, schedule: Schedule
) -> dict[str, Any]:
    """Tell all that must be the same for a checkpoint to be of this run."""
    assert whole.data.holdout is not None
    digest = sha256()
    for _, value in sorted(trained.encoder.state_dict().items()):
        digest.update(value.contiguous().numpy().tobytes())
    settings = asdict(recipe)
    # Half the workers may take twice the micro-batches; only what is drawn for each differs.
    settings["optim"].pop("accumulate")
    return {
        "backbone": digest.hexdigest(),
        "heads": heads_of(trained.encoder),
        "data": schedule.manifest.digest,
        "holdout": load_manifest(open_place(whole.data.holdout)).digest,
        "seed": whole.run.seed,
        "window": whole.data.window,
        **plain(settings),
    }


def _check_resume(
    recipe: Recipe, saved: checkpoints.Saved | None, facts: Mapping[str, Any], resume: bool
) -> None:
    """Refuse to overwrite a run, or to go on with one as if it were another."""
    if saved is None:
        require_not_lost(open_place(recipe.home), "choose another --name")
        return
    if not resume:
        raise ConfigError(
            f"run {recipe.home} already has a checkpoint at step {saved.step}; add --resume to go "
            "on with it, or choose another --name"
        )
    theirs = saved.record.get("finetune")
    if theirs is None:
        raise ConfigError(
            f"run {recipe.home} is a pre-training, not a fine-tuning; choose another --name"
        )
    changed = [name for name, value in facts.items() if theirs.get(name) != value]
    if changed:
        told = "; ".join(
            f"{name}: {theirs.get(name)!r} in the checkpoint, {facts[name]!r} now"
            for name in changed
        )
        raise ConfigError(
            f"run {recipe.home} was made with other settings; {told}; put them back, or choose "
            "another --name"
        )
