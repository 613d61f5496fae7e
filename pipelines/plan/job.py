"""The plan of a run, before any money is spent: pace, hours, memory, load and price.

Nothing is started and nothing is measured here. All that is no measurement says so.
"""

from dataclasses import dataclass

from droppos.errors import ConfigError
from pipelines.plan.fleet import choice
from pipelines.plan.option import Option, option
from pipelines.plan.question import Question
from pipelines.plan.scaling import Scale, at_size, scale
from pipelines.plan.workload import Workload, workload
from pipelines.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run would take."""

    recipe: Recipe
    question: Question
    work: Workload
    options: tuple[Option, ...]
    """One for each machine type that could train, the cheapest first, on spot or on demand; those
    whose memory is too small come last."""
    machines_source: str
    """Who says which machine types there are."""
    scaling: tuple[Scale, ...]
    """On machines of the best option's type; empty for workers without GPUs."""

    @property
    def best(self) -> Option:
        """The option that costs least."""
        return self.options[0]


def plan(recipe: Recipe, question: Question | None = None) -> Plan:
    """Plan a run.

    Args:
        recipe: The run; its workers are as many as it says.
        question: Machine types, prices, rates and measured figures; the usual ones when not given.

    Raises:
        ConfigError: If a machine type is not known, no GPU has memory enough, or nobody says how
            large the data set is.
        DataError: If the data set's manifest cannot be read.
    """
    question = question or Question()
    chosen = choice(recipe, question)
    work = workload(recipe, question)
    planned = [option(recipe, work, chosen, question, machine) for machine in chosen.training]
    planned.sort(key=lambda each: (not each.fits, each.cheaper.usd))
    best = planned[0]
    if not best.fits:
        raise ConfigError(_too_small(recipe, planned))
    scaling: tuple[Scale, ...] = ()
    if best.fleet.machine.gpus:
        scaling = scale(recipe, work, chosen, question, best)
    return Plan(
        recipe=recipe,
        question=question,
        work=work,
        options=tuple(planned),
        machines_source=chosen.source,
        scaling=scaling,
    )


def _too_small(recipe: Recipe, planned: list[Option]) -> str:
    """Say that no machine has memory enough, and what would make it fit."""
    largest = max(planned, key=lambda each: each.memory_bytes)
    needs, has = largest.memory.peak / 1e9, largest.memory_bytes / 1e9
    name = largest.fleet.machine.name
    smaller = at_size(recipe, recipe.run.workers, largest.memory_bytes)
    what = (
        f"a worker needs {needs:,.1f} GB for micro-batches of {recipe.worker_batch} images, and "
        f"of the given machine types {name} has the most, {has:,.1f} GB that can be used"
    )
    if smaller is not None and smaller.run.workers == recipe.run.workers:
        return (
            f"{what}; set optim.accumulate to {smaller.optim.accumulate}: the same steps in "
            "smaller micro-batches"
        )
    return f"{what}; take more workers, compute.activation_checkpointing, or larger machines"
