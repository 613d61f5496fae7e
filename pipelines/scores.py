"""Scores: what an evaluation found, in MLflow.

They belong to the run that made the backbone, if MLflow knows it: its folder is told by a
checkpoint's place. Figures of a data set are `evaluation/<data set>/...` there, at the step of the
checkpoint; a second data set whose folder has the same name has a hash added to it. Of any other
backbone they make a run of their own. Unlike a training's ledger this writes once, at the end, and
neither starts nor ends the run it adds to.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

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


def short_name(data: str) -> str:
    """Take the last folder's name of a data set, with no character that MLflow refuses."""
    return re.sub(r"[^\w.-]", "_", data.rstrip("/").rsplit("/", 1)[-1])


def name_in(tags: Mapping[str, str], data: str) -> str:
    """Name a data set in a run that may know another one of the same last folder.

    Args:
        tags: Of the run.
        data: The data set.

    Returns:
        Its short name; where that stands for another one, with a hash of the place of this one.
    """
    name = short_name(data)
    if tags.get(_tag(name, "data"), _shown(data)) == _shown(data):
        return name
    return f"{name}-{sha256(data.encode()).hexdigest()[:6]}"


def _tag(name: str, fact: str) -> str:
    return f"evaluation.{name}.{fact}"


def _shown(value: str) -> str:
    return redact(value)[:5000]


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
    name = short_name(data)
    now = now_ms()
    tags = {"backbone": backbone, "data": data, **facts}
    with open_experiment(tracking_uri(recipe), tracking.experiment) as (client, experiment):
        home = origin.home
        known = None if home is None else newest_run(client, experiment, redact_uris(home))
        if known is not None:
            name = name_in(known.data.tags, data)
        run = known or client.create_run(experiment, run_name=f"evaluate {name}", tags=provenance())
        client.log_batch(
            run.info.run_id,
            metrics=[
                Metric(f"evaluation/{name}/{metric}", value, now, origin.step)
                for metric, value in metrics.items()
            ],
            tags=[RunTag(_tag(name, tag), _shown(value)) for tag, value in tags.items()],
        )
        if known is None:
            client.set_terminated(run.info.run_id)
    return run.info.run_id
