"""Does a recipe fit machines that are still to come, and what it must spell out for them."""

from dataclasses import replace

from pipelines.launch.check import Wrong
from pipelines.machines import Cluster
from pipelines.recipe import Recipe
from pipelines.resources import Demand, Fit, FitError, solve


def fitted(recipe: Recipe, cluster: Cluster, source: str, at_once: int = 1) -> Fit:
    """Fit a recipe into a cluster, as `droppos pretrain` and `search` do it there.

    Args:
        recipe: The run.
        cluster: Before anything has grown.
        source: What says which machines there may be, for a person.
        at_once: Such runs at the same time.

    Raises:
        Wrong: If it does not; with the one number to change.
    """
    sharing = at_once > 1 and _may_share(recipe)
    demand = Demand.of(recipe, gpu=recipe.compute.device == "cuda", shared_decoding=sharing)
    try:
        return solve(cluster, demand, at_once)
    except FitError as error:
        raise Wrong(error.found, f"a recipe that fits {source}", error.way_out) from error


def _may_share(recipe: Recipe) -> bool:
    from pipelines.search_driver import may_share  # which loads Ray Tune: for searches alone

    return may_share(recipe)


def described(fit: Fit) -> str:
    """Say how a recipe fits."""
    grown = ", ".join(f"{count} x {name}" for name, count in fit.added.items())
    return f"needs {grown} beside the head" if grown else "fits on what stands"


def adapted(recipe: Recipe, cluster: Cluster) -> tuple[Recipe, list[str]]:
    """Say cuda where a recipe says auto and GPUs come from zero; and say what was changed.

    Auto looks at what stands when the job starts, and GPUs that come from zero do not stand.
    """
    if recipe.compute.device != "auto" or not any(machine.gpus for machine in cluster.machines):
        return recipe, []
    return replace(recipe, compute=replace(recipe.compute, device="cuda")), [
        "compute.device auto was made cuda: GPUs come only when they are asked for"
    ]
