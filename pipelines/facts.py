"""The facts a checkpoint tells of its run, and which of them must still hold when it goes on."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from droppos.errors import ConfigError
from pipelines.checkpoints import Saved, lost, require_recipe
from pipelines.order import VERSION, Schedule
from pipelines.recipe import MeasureProtocol, Recipe
from pipelines.recipe_file import flatten
from pipelines.shards import Manifest
from pipelines.storage import Place, open_place

logger = logging.getLogger(__name__)

FIXED = (
    "model",
    "method",
    "optim",
    "data.window",
    "data.crop_scale",
    "data.flip",
    "data.scaled_decoding",
    "run.seed",
    "run.init_from",
)
"""What must not change under a resumed run, or it is another run."""

MEASURED = {f"measure.{field.name}" for field in fields(MeasureProtocol)}
"""What must not change for figures of held-out pictures to compare with those of before."""

FREE = {"optim.accumulate"}
"""Of those, what gives the same steps: half the workers may take twice the micro-batches."""


def facts(
    recipe: Recipe, manifest: Manifest, init_from: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Tell what a checkpoint depends on: a resumed run must agree, and export reads the model.

    Args:
        recipe: The run.
        manifest: Of its data set.
        init_from: `uri` and `sha256` of the weights it was started from, if it was.
    """
    return {
        "recipe": asdict(recipe),
        "manifest": manifest.digest,
        "data": data_facts(manifest),
        "order": VERSION,
        "init_from": None if init_from is None else dict(init_from),
    }


def data_facts(manifest: Manifest) -> dict[str, Any]:
    """Describe a data set by what a person can compare; the digest alone says only 'other'."""
    content = "".join(shard.content for shard in manifest.shards)
    return {
        "pictures": manifest.rows,
        "shards": len(manifest.shards),
        "row groups": len(manifest.groups),
        "bytes": manifest.size,
        "classes": None if manifest.classes is None else list(manifest.classes),
        "content": hashlib.sha256(content.encode()).hexdigest(),
    }


def check_resume(
    recipe: Recipe,
    schedule: Schedule,
    saved: Saved | None,
    *,
    resume: bool,
    allow_changes: bool,
) -> None:
    """Refuse to overwrite a run, or to go on with one as if it were another.

    Raises:
        ConfigError: Naming the run or each difference, and the way out.
    """
    if saved is None:
        if not allow_changes:
            require_not_lost(
                open_place(recipe.home),
                "choose another run.name, or begin anew with --allow-changes",
            )
        return
    if "finetune" in saved.record:
        raise ConfigError(
            f"run {recipe.home} is a fine-tuning: `droppos finetune ... --resume` goes on, or "
            "choose another run.name"
        )
    if not resume:
        raise ConfigError(
            f"run {recipe.home} already has a checkpoint at step {saved.step}; add --resume to go "
            "on with it, or choose another run.name"
        )
    require_recipe(saved)
    ours, theirs = flatten(recipe), flatten(saved.record["recipe"])
    changed = [
        f"{name}: {theirs[name]!r} in the checkpoint, {value!r} now"
        for name, value in ours.items()
        # A field that the checkpoint does not know is newer than it, and starts at its old way.
        if name.startswith(FIXED) and name not in FREE and theirs.get(name, value) != value
    ]
    if saved.record["manifest"] != schedule.manifest.digest:
        then, now = saved.record.get("data"), data_facts(schedule.manifest)
        changed.append(f"data set {recipe.data.path}: {'; '.join(data_changes(then, now))}")
    measured = [
        f"{name} {theirs[name]!r} in the checkpoint, {value!r} now"
        for name, value in ours.items()
        if name in MEASURED and theirs.get(name, value) != value
    ]
    if measured:
        logger.warning(
            "what is measured on held-out pictures is not what it was, so figures from here on "
            "compare with none before, nor does run.keep_best: %s",
            "; ".join(measured),
        )
    if (version := saved.record.get("order", 1)) != VERSION:
        logger.warning(
            "the checkpoint was made with version %s of the order and crops of pictures, this "
            "droppos has version %s: what is left of its epoch is not exactly what it would have "
            "been",
            version,
            VERSION,
        )
    if changed and not allow_changes:
        raise ConfigError(
            f"run {recipe.home} was made with other settings; "
            + "; ".join(changed)
            + "; put them back, choose another run.name, or accept with --allow-changes"
        )
    if changed:
        logger.warning("resuming with changes: %s", "; ".join(changed))


def data_changes(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Iterator[str]:
    """Say in words how two data sets of different digests differ.

    Args:
        then: What `data_facts` told of the first; None for a checkpoint from before it did.
        now: What it tells of the second.
    """
    if then is None:
        yield "it is not the one the checkpoint was made with (which did not keep its counts)"
        return
    for name in ("pictures", "shards", "row groups", "bytes"):
        if then[name] != now[name]:
            yield f"{name} {then[name]:,} in the checkpoint, {now[name]:,} now"
    if then["classes"] != now["classes"]:
        before, after = classes_apart(then["classes"], now["classes"])
        yield f"classes {before} in the checkpoint, {after} now"
    if then["content"] != now["content"]:
        yield "content: pictures, their names, labels or order are others"
    elif then["row groups"] == now["row groups"]:
        yield "row groups: as many, but they are of other sizes"


def classes_apart(one: Sequence[str] | None, other: Sequence[str] | None) -> tuple[str, str]:
    """Count the classes of two data sets, and name the first of each that the other lacks.

    Where only their order differs, the first place where it does is named.
    """
    if one and other and set(one) == set(other) and list(one) != list(other):
        place = [ours == theirs for ours, theirs in zip(one, other, strict=True)].index(False)
        return (
            f"{len(one)} (at {place} {one[place]!r})",
            f"{len(other)} (at {place} {other[place]!r})",
        )

    def told(own: Sequence[str] | None, beside: Sequence[str] | None) -> str:
        if own is None:
            return "none"
        only = [name for name in own if name not in (beside or ())]
        example = f" ({only[0]!r} only there)" if only else ""
        return f"{len(own)}{example}"

    return told(one, other), told(other, one)


def require_not_lost(home: Place, way_out: str) -> None:
    """Refuse to begin a run again that is deleted, in part at least.

    Args:
        home: Folder of the run, of which no checkpoint counts.
        way_out: What to do, but to restore it.

    Raises:
        ConfigError: If one was made that is gone or damaged.
    """
    if (step := lost(home)) is not None:
        raise ConfigError(
            f"run {home} had a checkpoint at step {step}, and none that counts is left: it was "
            f"deleted, or found damaged; restore it, {way_out}"
        )
