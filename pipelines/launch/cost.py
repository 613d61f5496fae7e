"""What a cluster costs an hour: what stands from the start, and what it may grow to."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """So many machines of one kind, and the price of one."""

    name: str
    """As the cluster's file calls it."""
    machine: str
    """Type of the machine, with its market: `g6e.2xlarge, spot`."""
    standing: int
    """Machines that are there as long as the cluster is."""
    most: int
    """Machines that there may be at once, standing ones included."""
    dollars: float | None
    """US dollars an hour for one of them; None if nobody could tell."""
    source: str
    """Where the price was found, and of what day it is."""
    dearest: float | None = None
    """The same where there is none to be had at that price and another is paid; None if never."""

    @property
    def at_most(self) -> float:
        """US dollars an hour for one of them at the worst; 0 if nobody could tell."""
        return max(self.dollars or 0, self.dearest or 0)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a whole cluster."""

    kinds: Sequence[Kind] = ()
    note: str = ""
    """What the sum lacks, or why there is none."""
    most_machines: int | None = None
    """Machines beside the standing ones, over all kinds."""

    @property
    def standing(self) -> float:
        """US dollars an hour for what stands while nothing is asked of it."""
        return sum(kind.standing * (kind.dollars or 0) for kind in self.kinds)

    @property
    def most(self) -> float:
        """US dollars an hour with everything grown; the dearest machines first, if not all may be.

        A price that nobody could tell counts as none; `unknown` names those.
        """
        left = sum(kind.most for kind in self.kinds)
        if self.most_machines is not None:
            left = self.most_machines
        total = self.standing
        for kind in sorted(self.kinds, key=lambda kind: -kind.at_most):
            grown = min(kind.most - kind.standing, left)
            total += grown * kind.at_most
            left -= grown
        return total

    @property
    def unknown(self) -> list[str]:
        """Name the kinds that have no price."""
        return [kind.name for kind in self.kinds if kind.dollars is None]

    @property
    def line(self) -> str:
        """Say it in one line."""
        if len(self.unknown) == len(self.kinds):
            return self.note
        said = f"${self.standing:.2f} an hour from the start, ${self.most:.2f} with all it may add"
        if self.unknown:
            said += f", and what {', '.join(self.unknown)} cost, which nobody could tell"
        return said + (f"; {self.note}" if self.note else "")


def sources(cost: Cost) -> list[str]:
    """Say where the prices were found, each source once."""
    found: dict[str, list[str]] = {}
    for kind in cost.kinds:
        found.setdefault(kind.source, []).append(kind.name)
    return [f"price of {', '.join(names)}: {source}" for source, names in found.items()]


def table(cost: Cost) -> Table:
    """Show the price of each kind."""
    shown = Table(box=SIMPLE_HEAD, title="what an hour costs, in US dollars", title_justify="left")
    shown.add_column("kind", no_wrap=True)
    shown.add_column("machine")
    for name in ("min", "max", "each", "all"):
        shown.add_column(name, justify="right", no_wrap=True)
    for kind in cost.kinds:
        each = "unknown" if kind.dollars is None else f"{kind.dollars:.2f}"
        each += "" if kind.dearest is None else f" to {kind.dearest:.2f}"
        whole = "unknown" if kind.dollars is None else f"{kind.most * kind.at_most:.2f}"
        shown.add_row(
            escape(kind.name),
            escape(kind.machine),
            str(kind.standing),
            str(kind.most),
            each,
            whole,
        )
    return shown
