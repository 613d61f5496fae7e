"""Where a search ended, and what its report is told of that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.findings import Findings, Row
from pipelines.recipe import Objective, Recipe
from pipelines.sharing import Shared
from pipelines.space import read_space
from pipelines.trials import Record


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """Where a search ended."""

    home: str
    objective: Objective
    trials: list[Record]
    """In the order in which they began."""
    best: Record | None
    """The best of the setting that is best on average over its seeds; of finished ones."""
    folder: Path
    """Where report.html, trials.json and best.yaml are, on this machine."""
    tracking_run: str
    """Identifier of the MLflow run that the trials are shown under."""
    left: int
    """Trials that did not end or fail: the search was interrupted."""
    shared: Shared | None
    """What the trials of this process read together; None if they did not."""
    at_once: int

    @property
    def best_recipe(self) -> Path | None:
        """The best trial's recipe, for `droppos pretrain`."""
        return self.folder / "best.yaml" if self.best else None

    @property
    def finished(self) -> bool:
        """Whether every trial ran to its end, or failed."""
        return self.left == 0

    @property
    def storage_reads_ratio(self) -> float | None:
        """Windows read for every window that one trial alone would have read; 1 is perfect.

        Trials that run at once by themselves read as many times as much as there are of them.
        """
        if self.shared is None or not self.shared.taken:
            return None
        return self.shared.decoded * self.at_once / self.shared.taken


def findings_of(recipe: Recipe, outcome: SearchOutcome, best_yaml: str | None) -> Findings:
    """Tell the report what there is to tell."""
    measure = recipe.measure
    notes = []
    if outcome.left:
        notes.append(f"The search was interrupted: {outcome.left} of its trials did not end.")
    if recipe.search.scheduler == "asha":
        notes.append("Trials that ended early were behind others at the same epoch.")
    if recipe.search.scheduler == "pbt":
        notes.append(
            "Values changed while trials ran: those of a trial are its last ones, and what it "
            "scored came of all it had, and of weights that it took over from others. A run with "
            "the last ones from the beginning is another experiment."
        )
    shared = outcome.shared
    return Findings(
        name=recipe.run.name,
        objective=outcome.objective,
        dimensions=read_space(recipe),
        rows=[row_of(record) for record in outcome.trials],
        best=outcome.best.name if outcome.best else None,
        best_yaml=best_yaml,
        protocol=(
            f"All trials were measured on the same held-out pictures (at most "
            f"{measure.pictures:,}), which none of them trained on; for positions with the same "
            f"masks: {measure.mask_ratio:.0%} of the patches hidden, the position of "
            f"{measure.position_mask_ratio:.0%} of the others dropped."
        ),
        notes=notes,
        scheduled=recipe.search.scheduler == "pbt",
        sharing=None
        if shared is None
        else {
            "windows read and decoded": shared.decoded,
            "windows that trials took": shared.taken,
            "trials at once": outcome.at_once,
            "reads, of one trial's": outcome.storage_reads_ratio or 0.0,
        },
    )


def row_of(record: Record) -> Row:
    """Tell the report of a trial."""
    ended: Any = record.state if record.ended else "stopped"
    return Row(
        name=record.name,
        point=record.point,
        state=ended,
        figures=record.figures,
        history=record.history,
        step=record.step,
        steps=record.steps,
        seconds=record.seconds,
        error=record.error,
        tracking_run=record.tracking_run,
    )
