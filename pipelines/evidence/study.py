"""The study: how much is compared, and which cells that makes. Imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from droppos.errors import ConfigError
from pipelines.evidence.arms import ARMS, Arm, Name, figures_of
from pipelines.evidence.results import Key, Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """How much is compared."""

    budget: int = 5
    """What each arm may compute, in epochs of DropPos as published."""
    seeds: int = 3
    """Trainings of each arm."""
    curve: tuple[int, ...] = (10, 20)
    """Larger budgets, at which a few arms are trained once: what more computing gives."""
    curve_arms: tuple[str, ...] = ("paper", "no_attentive", "pixels")
    """Those arms."""
    ablations: bool = True
    """Try the paper's settings beside others by `droppos search`, once all else is known."""
    at_once: int | None = None
    """Cells worked on at the same time, each by one thread and in up to 5 GB; one for each CPU when
    not given."""
    minutes: float | None = None
    """Stop after so long, to go on another time, without ablations; not before all is known when
    not given. What a cell does after its pre-training has no checkpoint: minutes are lost."""
    only: tuple[str, ...] = ()
    """Some cells, as ARM/BUDGET/SEED, of this study or not; all of it when not given."""
    again: bool = False
    """Take what --only names again, from the beginning."""

    def __post_init__(self) -> None:
        for name in ("budget", "seeds", "at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if self.minutes is not None and self.minutes < 0:
            raise ConfigError(f"--minutes must be 0 or more, got {self.minutes}")
        for budget in self.curve:
            if budget < 1:
                raise ConfigError(f"--curve must be of budgets of 1 or more, got {budget}")
        pre_trained = [arm.name for arm in ARMS if arm.kind == "pre-trained"]
        for arm in self.curve_arms:
            if arm not in pre_trained:
                raise ConfigError(
                    f"--curve-arms must be of {', '.join(pre_trained)}, got {arm!r}; others have "
                    "no budget to vary"
                )
        for text in self.only:
            Name.parse(text)
        if self.again and not self.only:
            raise ConfigError(
                "--again takes what --only names again, and --only names nothing; to begin all "
                "anew, name another --folder and --out"
            )

    @property
    def whole(self) -> bool:
        """Whether it compares what the page of the repository tells of."""
        usual = Study()
        return (self.budget, self.curve, self.curve_arms) == (
            usual.budget, usual.curve, usual.curve_arms,
        )  # fmt: skip

    @property
    def budgets(self) -> list[int]:
        """All budgets, smallest first."""
        return sorted({self.budget, *self.curve})

    def cells(self) -> list["Planned"]:
        """List the cells, those first that say most about all, each once."""
        found = {str(cell.name): cell for cell in reversed([*self._all()])}
        if self.only:
            return [found.get(text) or Planned.of(Name.parse(text)) for text in self.only]
        return list(found.values())[::-1]

    def budget_of(self, arm: Arm) -> int:
        """Tell what an arm computes; nothing, where nothing is trained."""
        return self.budget if arm.trained else 0

    def _all(self) -> Iterator["Planned"]:
        yield from self._seed(0)
        for budget in self.curve[:1]:
            yield from self._larger(budget)
        for seed in range(1, self.seeds):
            yield from self._seed(seed)
        for budget in self.curve[1:]:
            yield from self._larger(budget)

    def _seed(self, seed: int) -> Iterator["Planned"]:
        for arm in ARMS:
            if arm.kind != "pixels" or seed == 0:
                yield Planned.of(Name(arm.name, self.budget_of(arm), seed))

    def _larger(self, budget: int) -> Iterator["Planned"]:
        for arm in self.curve_arms:
            yield Planned.of(Name(arm, budget, 0), curve=True)


@dataclass(frozen=True, slots=True)
class Planned:
    """A cell, and what is to be known of it."""

    name: Name
    figures: tuple[str, ...]

    @classmethod
    def of(cls, name: Name, curve: bool = False) -> "Planned":
        """Ask of a cell what its arm allows."""
        return cls(name, tuple(figures_of(name.about, curve)))

    def missing(self, rows: Mapping[Key, Row]) -> list[str]:
        """List the figures that are not known."""
        name = self.name
        return [
            figure
            for figure in self.figures
            if (name.arm, name.budget, name.seed, figure) not in rows
        ]
