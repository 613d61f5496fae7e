"""What a place to run jobs must be able to do."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.launch.check import Look
from pipelines.launch.cost import Cost
from pipelines.recipe import Recipe

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Address:
    """A cluster's jobs API, as this machine reaches it."""

    url: str
    """http:// or https://, without a path."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What goes with each request; it may hold the token."""


class Backend(Protocol):
    """Machines, and the way to the jobs API of the cluster on them."""

    remote: bool
    """Whether its machines are others than this one, so that they do not see its files."""
    mortal: bool
    """Whether the machines are started and ended by us."""

    @property
    def where(self) -> str:
        """What a person calls it."""
        ...

    def place(self) -> Mapping[str, str]:
        """Spell out what the flags left to this machine's settings: fields of the record.

        The settings may be others by the time that the machines are to be ended.
        """
        ...

    def looks(self, recipe: Recipe, at_once: int = 1) -> Sequence[Look]:
        """List what has to be right before `up`, for so many of such runs at the same time.

        Each one may be done in its turn.
        """
        ...

    def adapted(self, recipe: Recipe) -> tuple[Recipe, list[str]]:
        """Spell out what a job could not find out there by itself, and say what was changed."""
        ...

    def job_env(self) -> Mapping[str, str]:
        """Variables that a job needs there; no secrets."""
        ...

    def cost(self) -> Cost:
        """Tell what an hour costs: what stands at once, and with everything grown."""
        ...

    def up(self, say: Say) -> None:
        """Bring the cluster up, or find it up; raises LaunchError."""
        ...

    def address(self) -> AbstractContextManager[Address]:
        """Open a way to the jobs API; raises LaunchError if there is no cluster."""
        ...

    def down(self, say: Say) -> list[str]:
        """End all machines.

        Returns:
            What is left, each with its name; nothing when all went well.
        """
        ...
