"""What the raw results say, asked by arm, budget and figure."""

from collections.abc import Mapping, Sequence

from pipelines.evidence.arms import BY_NAME
from pipelines.evidence.results import Estimate, Key, Row, estimate


class Known:
    """The rows of a CSV, asked by what they are of."""

    def __init__(self, rows: Mapping[Key, Row]) -> None:
        self._rows = rows

    def over_seeds(self, arm: str, budget: int, figure: str) -> Estimate | None:
        """Average a figure over the seeds that are known."""
        return estimate(row.value for row in self._of(arm, budget, figure))

    def any_of(self, arm: str, budget: int) -> Row | None:
        """Give some row of an arm that was trained, on all pictures."""
        found = (
            row
            for row in self._rows.values()
            if row.key[:2] == (arm, budget) and row.epochs and row.figure != "tenth"
        )
        return next(found, None)

    def seeds(self, arm: str, budget: int) -> list[int]:
        """List the seeds of which anything is known."""
        return sorted({row.seed for row in self._rows.values() if row.key[:2] == (arm, budget)})

    def gain(self, arm: str, budget: int, figure: str) -> Estimate | None:
        """Average what pre-training adds to random weights by the same fine-tuning, by seed."""
        return self.paired((arm, budget), ("random", 0), figure)

    def paired(self, arm: tuple[str, int], less: tuple[str, int], figure: str) -> Estimate | None:
        """Average the difference of two arms with their budgets, seed by seed.

        What has no seed is the same for all.
        """
        ours = {row.seed: row.value for row in self._of(*arm, figure)}
        theirs = {row.seed: row.value for row in self._of(*less, figure)}
        if BY_NAME[less[0]].kind == "pixels" and theirs:
            theirs = dict.fromkeys(ours, theirs[0])
        return estimate(ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys())

    def course(self, arm: str, budgets: Sequence[int], figure: str) -> list[tuple[float, float]]:
        """List the TFLOP of the trainings that are known, with what the figure came to."""
        return [
            (row.gflops / 1e3, found.mean)
            for budget in self.budgets(arm, budgets, figure)
            if (row := self.any_of(arm, budget)) and (found := self.over_seeds(arm, budget, figure))
        ]

    def budgets(self, arm: str, budgets: Sequence[int], figure: str) -> list[int]:
        """List those at which a figure of an arm is known."""
        return [
            budget
            for budget in budgets
            if self.any_of(arm, budget) and self.over_seeds(arm, budget, figure)
        ]

    def _of(self, arm: str, budget: int, figure: str) -> list[Row]:
        own = (row for row in self._rows.values() if row.key[:2] == (arm, budget))
        return [row for row in own if row.figure == figure]
