"""Where a run starts: new, or from weights that were trained before (run.init_from).

The driver reads those weights and holds them against the recipe before any worker starts, and
keeps what the run takes of them in the run's home. So every worker, and every group that starts
before there is a checkpoint, begins with the same bytes, on whatever node, even if the original
has changed or gone::

    start.safetensors   weights by the names of droppos.model
    start.json          written last: what they were taken from, its hash, and the hash of the above
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save

from droppos.beginning import first_weights
from droppos.config import Heads
from droppos.errors import TrainingError
from droppos.foreign import standard_heads
from droppos.parallel import load_whole
from droppos.step import TrainState
from pipelines.backbone import TIMM_PREFIX, open_backbone
from pipelines.checkpoints import Saved
from pipelines.recipe import Recipe
from pipelines.registry import SCHEME
from pipelines.storage import Place, open_place

WEIGHTS, RECORD = "start.safetensors", "start.json"


def located_start(uri: str | None) -> str | None:
    """Spell out a place; what timm downloads and what MLflow registers have none."""
    return uri if uri is None or uri.startswith((TIMM_PREFIX, SCHEME)) else open_place(uri).uri


@dataclass(frozen=True, slots=True)
class Start:
    """Weights that a run begins with."""

    said: str
    """What a person should know of it."""
    weights: bytes
    record: bytes

    def keep(self, home: Place) -> None:
        """Write it to the home of the run, which has no checkpoint and is this driver's own."""
        (home / WEIGHTS).write_bytes(self.weights)
        (home / RECORD).write_bytes(self.record)


def clear(home: Place) -> None:
    """Delete what an earlier try left of its start."""
    for name in (RECORD, WEIGHTS):
        (home / name).delete()


def read_start(recipe: Recipe) -> Start | None:
    """Read what a run starts from; None for one that starts new. Nothing is written.

    Raises:
        DataError: If run.init_from is not there, or cannot be read.
        ConfigError: If it does not fit the recipe's model.
    """
    uri = recipe.run.init_from
    if uri is None:
        return None
    shape = recipe.model.shape
    usual = standard_heads(shape.width, shape.depth)
    # For weights that don't tell: a standard encoder's heads, or those the recipe says.
    heads = Heads(encoder=usual or shape.heads, decoder=recipe.model.decoder_heads)
    source = open_backbone(uri, heads)
    first = first_weights(uri, source, recipe.model, recipe.method)
    data = save(first.weights)
    digest = hashlib.sha256(data).hexdigest()
    record = {"uri": source.uri, "sha256": source.sha256 or digest, "weights": digest}
    return Start(
        f"starting from {source.uri}: {first.notice}",
        data,
        json.dumps(record, indent=1).encode() + b"\n",
    )


def started_from(saved: Saved | None, home: Place, init_from: str | None) -> dict[str, str] | None:
    """Tell what a run was started from: `uri` and `sha256`; None for one that started new.

    Args:
        saved: The checkpoint it goes on from, which tells it; if none, its home does.
        home: Folder of the run.
        init_from: What the recipe says.

    Raises:
        TrainingError: If the home lacks what the recipe says: the run would start new.
    """
    if saved is not None:
        return saved.record.get("init_from")
    if init_from is None:
        return None
    if not (home / RECORD).exists():
        raise TrainingError(
            f"{home / RECORD} is gone, which the driver wrote when this run started from "
            f"{init_from}; start the run again, which writes it anew"
        )
    record = json.loads((home / RECORD).read_bytes())
    return {"uri": record["uri"], "sha256": record["sha256"]}


def load_start(state: TrainState, home: Place) -> None:
    """Put the kept weights into this rank's model, however it is spread.

    Raises:
        TrainingError: If they are not what the driver kept.
    """
    record: Mapping[str, Any] = json.loads((home / RECORD).read_bytes())
    data = (home / WEIGHTS).read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != record["weights"]:
        raise TrainingError(
            f"{home / WEIGHTS} is damaged: expected sha256 {record['weights']}, got {found}; "
            "start the run again, which writes it anew"
        )
    load_whole(state.model, load(data))
