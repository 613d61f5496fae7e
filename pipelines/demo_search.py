"""The demo of a search: eight trials on photographs that come with our dependencies."""

from collections.abc import Callable

from pipelines.demo import with_demo_pictures
from pipelines.heard import OnEvent
from pipelines.recipe import Recipe
from pipelines.search import search
from pipelines.search_outcome import SearchOutcome


def demo_search(
    recipe: Recipe, *, resume: bool, say: Callable[[str], None], on_event: OnEvent | None = None
) -> tuple[Recipe, SearchOutcome]:
    """Prepare photographs, and search on them.

    Args:
        recipe: The shipped recipe of this demo, with whatever was overridden.
        resume: Go on with its last search.
        say: Told what begins.
        on_event: Hears of each trial's state, step and objective.

    Returns:
        The recipe, with its data; and where the search ended.
    """
    say("cutting photographs into tiles, and packing them into shards")
    recipe, _, _ = with_demo_pictures(recipe)
    say("searching: Ray Tune proposes, trials share one stream, MLflow listens")
    return recipe, search(recipe, resume=resume, on_event=on_event)


def line(outcome: SearchOutcome) -> str:
    """Tell scripts how it went."""
    finished = sum(trial.state == "finished" for trial in outcome.trials)
    best = outcome.best.name if outcome.best else "none"
    ratio = outcome.storage_reads_ratio
    reads = "none" if ratio is None else f"{ratio:.2f}"
    return (
        f"search trials={len(outcome.trials)} finished={finished} best={best} "
        f"storage_reads_ratio={reads}"
    )
