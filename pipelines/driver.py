"""A run's driver: it takes the run over, opens the ledger, and hears the workers to their end.

All jobs that train under a supervisor are driven alike. What differs is what their workers do, and
what is made of it in the end.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from droppos.errors import DataError
from pipelines import history
from pipelines.aside import Aside
from pipelines.attempt import taken_over
from pipelines.checkpoints import Saved
from pipelines.cluster import with_device
from pipelines.heard import Heard, OnEvent
from pipelines.ledger import Ledger
from pipelines.order import Schedule
from pipelines.provenance import cluster_hardware
from pipelines.recipe import Recipe
from pipelines.sharing import Sharing
from pipelines.skipped import Skipped
from pipelines.storage import Place, open_place
from pipelines.supervisor import Supervisor, Work

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Driver:
    """One that has taken a run over."""

    recipe: Recipe
    schedule: Schedule
    ledger: Ledger
    heard: Heard
    name: str
    """By which its groups of workers know it."""

    def train(
        self,
        work: Work = Work(),  # noqa: B008 - frozen
        *,
        stop: Callable[[], bool] = lambda: False,
        sharing: Sharing | None = None,
    ) -> None:
        """Run workers until the last step is kept, or the run is stopped.

        Args:
            work: What they do.
            stop: Asked now and then; once it says yes, the run ends as after Ctrl-C.
            sharing: Decode together with other trials that read the same.

        Raises:
            TrainingError: If they failed more often than run.max_failures.
            DataError: If too many pictures had to be skipped.
        """
        supervisor = Supervisor(
            with_device(self.recipe),
            self.schedule,
            self.heard,
            driver=self.name,
            stop=stop,
            sharing=sharing,
            work=work,
        )
        try:
            supervisor.run()
        finally:
            self.heard.keep_skipped(last=True)


@contextmanager
def driving(
    recipe: Recipe,
    schedule: Schedule,
    saved: Saved | None,
    *,
    resume: bool,
    parent_run: str | None = None,
    on_event: OnEvent | None = None,
    aside: Aside | None = None,
) -> Iterator[Driver]:
    """Take a run over, and keep its ledger until the block ends.

    Args:
        recipe: The run, all of whose places are spelt out; the cluster is up.
        schedule: Its order.
        saved: Where it stands.
        resume: Go on with the MLflow run of its folder, if there is one.
        parent_run: MLflow run that this one is shown under.
        on_event: Hears of progress.
        aside: Measures checkpoints; None where the workers do.

    Raises:
        ConfigError: If MLflow cannot be reached.
        DataError: If storage cannot be read or written.
    """
    home = open_place(recipe.home)
    digest = schedule.manifest.digest
    with (
        taken_over(home) as taken,  # before the ledger does: who trains and who logs are one
        Ledger.open(recipe, digest, resume=resume, parent_run=parent_run) as ledger,
    ):
        taken.begun = True  # what MLflow is told comes from here now
        skipped = Skipped(
            home,
            schedule.manifest.rows,
            recipe.data.skip_limit,
            # A fine-tuning goes on with the very data, or not at all.
            resumed=saved is not None and saved.record.get("manifest", digest) == digest,
        )
        if saved is not None:
            _replay(ledger, home, saved)
        ledger.tag(cluster_hardware())
        heard = Heard(ledger, skipped, recipe.tracking.price_per_worker_hour, on_event, aside)
        heard.event(
            {
                "kind": "plan",
                "step": saved.step if saved else 0,
                "steps": schedule.steps,
                "tracking_run": ledger.run_id,
            }
        )
        yield Driver(recipe, schedule, ledger, heard, taken.driver)


def _replay(ledger: Ledger, home: Place, saved: Saved) -> None:
    """Make MLflow whole up to a checkpoint: it lacks what a killed driver had not sent."""
    try:
        ledger.replay(history.read(home, saved.step, ledger.last_step("train/loss")))
    except DataError as error:
        _log.warning("MLflow may lack steps before %d: %s", saved.step, error)
