"""What every worker of a group is told when it starts."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.events import Events
from pipelines.order import Schedule
from pipelines.recipe import Recipe
from pipelines.storage import Place, open_place


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker of a run is told."""

    recipe: Recipe
    """The run, with as many workers as this group has."""
    schedule: Schedule
    events: Events
    driver: str
    """Name of the driver's attempt, see :mod:`pipelines.attempt`."""
    origin: Mapping[str, str]
    """Code and command of the driver, for its checkpoints: :func:`pipelines.provenance.origin`."""

    @property
    def home(self) -> Place:
        """Folder of the run."""
        return open_place(self.recipe.home)
