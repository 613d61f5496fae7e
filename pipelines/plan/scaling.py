"""Scaling: the same run on 8, 64, 512 and 4,096 GPUs, and the part that bounds it at each size.

The global batch stays, since it decides what is learnt; so each GPU has fewer images of a step,
until there are more GPUs than images. Machines that decode are added as the pace asks for.
"""

from dataclasses import dataclass, replace

from droppos.errors import ConfigError
from droppos.footprint import worker_footprint
from pipelines.plan.fleet import Choice
from pipelines.plan.option import Option, option
from pipelines.plan.question import Question
from pipelines.plan.workload import Workload
from pipelines.recipe import Recipe

SIZES = (8, 64, 512, 4096)
MOSTLY_LOST = 0.5
"""Share of the time that goes to lost machines above which these are what bounds a run."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A run on so many GPUs."""

    gpus: int
    used: int
    """Of them, by workers: no more than there are images in a step."""
    option: Option | None
    """None if it cannot be: `bound` says why."""
    shards: int
    """GPUs that share one copy of the weights (compute.shard_ranks); 1 if nobody says."""

    @property
    def images_per_gpu(self) -> float:
        """Images of a step for each GPU there is; below 1, some have none."""
        assert self.option is not None
        return self.option.recipe.optim.global_batch / self.gpus

    @property
    def lost(self) -> float:
        """Share of the expected time, on spot if that is offered, that goes to lost machines."""
        assert self.option is not None
        return (self.option.spot or self.option.on_demand).lost

    @property
    def bound(self) -> str:
        """Name the part that bounds it."""
        if self.option is None:
            return "shard_ranks" if self.gpus < self.shards else "memory of a GPU"
        if self.lost > MOSTLY_LOST:
            return "lost machines"
        if self.used < self.gpus:
            return f"the batch: {self.images_per_gpu:.2g} images a GPU"
        return self.option.bound


def scale(
    recipe: Recipe,
    work: Workload,
    chosen: Choice,
    question: Question,
    name: str,
    memory_bytes: float,
    sizes: tuple[int, ...] = SIZES,
) -> tuple[Scale, ...]:
    """Plan a recipe at several sizes, on machines of one type.

    Args:
        recipe: Its workers and micro-batches are chosen anew for each size.
        work: What it has to do.
        chosen: Machine types.
        question: Rates, prices, measured figures.
        name: Machine type of the workers.
        memory_bytes: That a worker may use.
        sizes: Numbers of GPUs.
    """
    # So many CPUs decode in the recipe as suit its own size.
    free = replace(recipe, data=replace(recipe.data, decode_cpus=None))
    found = []
    for gpus in sizes:
        sized = at_size(free, gpus, memory_bytes)
        planned = option(sized, work, chosen, question, name) if sized else None
        shards = recipe.compute.shard_ranks or 1
        found.append(Scale(gpus, sized.run.workers if sized else 0, planned, shards))
    return tuple(found)


def at_size(recipe: Recipe, gpus: int, memory_bytes: float) -> Recipe | None:
    """Give a recipe as many workers as can share its batch, in the fewest micro-batches that fit.

    Returns:
        None if even single images don't fit, or the GPUs are fewer than share the weights.
    """
    batch = recipe.optim.global_batch
    shards = recipe.compute.shard_ranks or 1
    most = min(gpus, batch)
    workers = next((n for n in range(most, 0, -1) if batch % n == 0 and n % shards == 0), 1)
    if workers % shards:
        return None
    for accumulate in range(1, batch // workers + 1):
        if batch % (workers * accumulate):
            continue
        images = batch // (workers * accumulate)
        if fits(recipe, workers, images, accumulate, memory_bytes):
            return with_workers(recipe, workers, accumulate)
    return None


def fits(recipe: Recipe, workers: int, images: int, accumulate: int, memory_bytes: float) -> bool:
    """Tell whether a worker's memory is enough for micro-batches of so many images."""
    needed = worker_footprint(
        recipe.model,
        recipe.method,
        recipe.compute,
        images=images,
        workers=workers,
        accumulate=accumulate,
    )
    return needed.peak <= memory_bytes


def with_workers(recipe: Recipe, workers: int, accumulate: int) -> Recipe:
    """Spread the same steps over another number of workers."""
    strategy = recipe.compute.strategy
    if strategy == "single" and workers > 1:
        strategy = "ddp"
    try:
        return replace(
            recipe,
            run=replace(recipe.run, workers=workers, min_workers=None),
            optim=replace(recipe.optim, accumulate=accumulate),
            compute=replace(recipe.compute, strategy=strategy),
        )
    except ConfigError as error:
        raise ConfigError(f"{workers} workers cannot share this recipe: {error}") from error
