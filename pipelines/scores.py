"""Scores: what an evaluation found, in MLflow.

They belong to the run that made the backbone, if MLflow knows it: its folder is told by a
checkpoint's place. Figures of a data set are `evaluation/<data set>/...` there, at the step of the
checkpoint. Of any other backbone they make a run of their own. Unlike a training's ledger this
writes once, at the end, and neither starts nor ends the run it adds to.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipelines.journal import now_ms
from pipelines.ledger import newest_run
from pipelines.provenance import provenance
from pipelines.recipe import Recipe, Tracking
from pipelines.secrets import redact, redact_uris
from pipelines.tracking import open_experiment, tracking_uri


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a backbone came from, as far as its place tells."""

    storage: str | None
    """Storage of the run."""
    home: str | None
    """Folder of the run."""
    step: int
    """Of the checkpoint; 0 where it is not known."""

    @classmethod
    def of(cls, uri: str) -> "Origin":
        """Read a checkpoint's place: `storage/run/checkpoints/step-00000120`."""
        found = re.fullmatch(r"((.+)/[^/]+)/checkpoints/step-(\d+)", uri.rstrip("/"))
        if found is None:
            return cls(None, None, 0)
        return cls(found[2], found[1], int(found[3]))


def track_figures(
    metrics: Mapping[str, float],
    *,
    backbone: str,
    data: str,
    facts: Mapping[str, str],
    tracking: Tracking,
) -> str:
    """Write figures and what they are of.

    Args:
        metrics: By name, as `Evaluation.metrics`.
        backbone: Place of the export or the checkpoint that was measured, written out.
        data: The data set.
        facts: What else decides the figures; become tags.
        tracking: Where MLflow is.

    Returns:
        Identifier of the MLflow run.

    Raises:
        ConfigError: If MLflow cannot be reached.
    """
    from mlflow.entities import Metric, RunTag

    origin = Origin.of(backbone)
    recipe = Recipe(tracking=tracking)
    if origin.storage is not None:
        recipe = replace(recipe, run=replace(recipe.run, storage=origin.storage))
    name = re.sub(r"[^\w.-]", "_", data.rstrip("/").rsplit("/", 1)[-1])
    now = now_ms()
    tags = {"backbone": backbone, "data": data, **facts}
    with open_experiment(tracking_uri(recipe), tracking.experiment) as (client, experiment):
        home = origin.home
        known = None if home is None else newest_run(client, experiment, redact_uris(home))
        run = known or client.create_run(experiment, run_name=f"evaluate {name}", tags=provenance())
        client.log_batch(
            run.info.run_id,
            metrics=[
                Metric(f"evaluation/{name}/{metric}", value, now, origin.step)
                for metric, value in metrics.items()
            ],
            tags=[
                RunTag(f"evaluation.{name}.{tag}", redact(value)[:5000])
                for tag, value in tags.items()
            ],
        )
        if known is None:
            client.set_terminated(run.info.run_id)
    return run.info.run_id
