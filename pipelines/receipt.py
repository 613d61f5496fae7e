"""The receipt: one file that says what a backbone came from, for whoever was not there.

It names the run, its recipe, seeds, code and commands; the data, shard by shard; every checkpoint
on the way (:mod:`pipelines.chain`), and the files of the last one and of the export made of it, by
hash. All of it follows from what storage has, so :mod:`pipelines.receipt_check` can make it again
and compare. Secrets are blotted out: a receipt is for others.

The last field, ``sha256``, is the hash of all the others as JSON with sorted keys, no spaces, and
escapes for all that is not ASCII: what `json.dumps` of Python gives.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from math import isfinite
from typing import Any

from droppos.errors import ConfigError, DataError, StorageError
from pipelines import chain, checkpoints
from pipelines.chain import PREVIOUS, Link
from pipelines.checkpoints import COMPLETE, Saved, hashed, require_recipe
from pipelines.ledger import pointer
from pipelines.likeness import differing_weights
from pipelines.recipe_file import flatten
from pipelines.secrets import redact
from pipelines.shards import load_manifest
from pipelines.storage import Place, open_place
from pipelines.tracking import Where

FORMAT = "droppos-receipt/1"

Receipt = dict[str, Any]


def make(saved: Saved, backbone: str | None = None) -> tuple[Receipt, list[str]]:
    """Make the receipt of a checkpoint, and of an export that was made of it.

    Args:
        saved: The checkpoint.
        backbone: Folder of the export.

    Returns:
        The receipt, and what it cannot tell.

    Raises:
        DataError: If the checkpoint is of no run of droppos, its past is not whole, or the export
            is of another one.
    """
    require_recipe(saved)
    newest = Link.of((saved.place / COMPLETE).read_bytes())
    links = list(chain.walk(saved.home, newest))[::-1]
    receipt = {
        "format": FORMAT,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_by": f"droppos {version('droppos')}",
        "run": {"name": saved.record["recipe"]["run"]["name"], "home": saved.home.uri},
        "mlflow": {k: v for k, v in pointer(saved.home).items() if k in {"uri", "run_id"}},
        **described(links),
    }
    shards, notes = _shards(saved)
    receipt["data"] |= shards
    if PREVIOUS not in links[0].record:
        notes.append(
            f"what was before step {links[0].step} is not told: an older droppos saved that "
            "checkpoint, and named none before it"
        )
    if backbone is not None:
        receipt["backbone"] = {"files": _exported(saved, open_place(backbone))}
    receipt = shown(receipt)
    return {**receipt, "sha256": digest(receipt)}, notes


def described(links: Sequence[Link]) -> Receipt:
    """Tell what follows from the records of a run's checkpoints alone.

    Args:
        links: From the first to the one the receipt is of.
    """
    newest = links[-1].record
    recipe = flatten(newest["recipe"])
    told = {
        "recipe": recipe,
        "seeds": {name: value for name, value in recipe.items() if name.endswith(".seed")},
        "code": list(_origins(links)),
        "data": {"manifest": newest["manifest"], "facts": newest.get("data")},
        "chain": [entry(link) for link in links],
        "checkpoint": {
            "step": links[-1].step,
            "sha256": links[-1].sha256,
            "files": newest["files"],
        },
    }
    return shown(told)


def entry(link: Link) -> Receipt:
    """Tell of one checkpoint; no `previous` at all if an older droppos saved it."""
    told = ("saved_at", "world_size", "metrics", "manifest", PREVIOUS)
    known = {name: link.record[name] for name in told if name in link.record}
    return shown({"step": link.step, "sha256": link.sha256, **known})


def _origins(links: Sequence[Link]) -> Iterator[Receipt]:
    """Tell each code and command that saved checkpoints, with the first one it saved."""
    last: Receipt = {}
    for link in links:
        own = {name: link.record[name] for name in ("code", "torch")}
        own |= link.record.get("origin", {})
        if own != last:
            yield {"first_checkpoint": link.step, **own}
        last = own


def _shards(saved: Saved) -> tuple[Receipt, list[str]]:
    path = saved.record["recipe"]["data"]["path"]
    try:
        manifest = load_manifest(open_place(path))
    except DataError as error:
        return {}, [f"the shards are not listed, only the digest of them all: {error}"]
    if manifest.digest != saved.record["manifest"]:
        return {}, [
            f"the shards are not listed, only the digest of them all: {path} is another data set "
            "by now"
        ]
    shards = [asdict(shard) for shard in manifest.shards]
    return {"schema_version": manifest.schema_version, "shards": shards}, []


def _exported(saved: Saved, folder: Place) -> Receipt:
    if differing := differing_weights(saved, folder):
        raise DataError(
            f"{folder} was not exported from {saved.uri}: {differing[0]}"
            f"{f', and {len(differing) - 1} more' if len(differing) > 1 else ''}; name the "
            "checkpoint it was made of, or export again"
        )
    return {file.name: hashed(folder / file.name)._asdict() for file in folder.files()}


def shown(value: Any) -> Any:
    """Make a value fit to be shown: without secrets, and JSON to every reader (no NaN)."""
    if isinstance(value, Mapping):
        return {name: shown(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [shown(inner) for inner in value]
    if isinstance(value, str):
        return redact(value)
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def digest(receipt: Mapping[str, Any]) -> str:
    """Hash a receipt; its own hash is left out."""
    rest = {name: value for name, value in receipt.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write(receipt: Receipt, out: str) -> None:
    """Write a receipt; one of the same checkpoint is replaced.

    Raises:
        ConfigError: If another file is there.
        DataError: If storage refuses.
    """
    place = open_place(out)
    if place.exists():
        try:
            before = load(out)
        except DataError:
            before = None
        if before is None or before["checkpoint"]["sha256"] != receipt["checkpoint"]["sha256"]:
            of = "another file"
            if before is not None:
                of = (
                    f"the receipt of step {before['checkpoint']['step']} of {before['run']['home']}"
                )
            raise ConfigError(f"{out} is {of}, and is kept; name another file with --out")
    place.write_bytes(json.dumps(receipt, indent=1).encode() + b"\n")


def load(uri: str) -> Receipt:
    """Read a receipt.

    Raises:
        DataError: If there is none, or it is of another kind.
    """
    try:
        receipt = json.loads(open_place(uri).read_bytes())
        if receipt["format"] != FORMAT:
            raise ValueError(f"its format is {receipt['format']!r}")
        lacking = {"recipe", "seeds", "code", "data", "chain", "checkpoint"} - receipt.keys()
        if lacking or not receipt["chain"]:
            raise ValueError(f"it lacks {', '.join(sorted(lacking)) or 'a checkpoint'}")
    except StorageError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{uri} is no receipt of format {FORMAT}: {error}; `droppos receipt RUN` writes one"
        ) from error
    return receipt


def locate(run: str, where: Where) -> Saved:
    """Find the checkpoint that a person means by a place, or by the name of a run in MLflow.

    Args:
        run: Folder of a run or of a checkpoint; or a run's name, or its id.
        where: Where runs are looked for by name.

    Raises:
        DataError: If there is neither.
    """
    if "/" in run or open_place(run).exists():
        return checkpoints.at(run)
    from pipelines.runs import Registry

    try:
        found = Registry(where).run(run)
    except DataError as error:
        raise DataError(f"there is no folder {run}, and {error}") from error
    if not found.home:
        raise DataError(f"run {run} ({found.run_id}) names no folder; droppos did not make it")
    return checkpoints.at(found.home)
