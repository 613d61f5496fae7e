"""The files that a receipt names, hashed again: a checkpoint's, and those of its export."""

from collections.abc import Generator, Iterator, Mapping
from typing import Any

from droppos.errors import DropposError, StorageError
from droppos.export.timm_vit import WEIGHTS
from pipelines import checkpoints
from pipelines.check import Check
from pipelines.checkpoints import COMPLETE, DAMAGED, hashed
from pipelines.likeness import differing_weights
from pipelines.receipt import Receipt
from pipelines.storage import Place, open_place


def checkpoint_checks(told: Receipt, folder: Place) -> Generator[Check, None, bool]:
    """Compare a checkpoint's files.

    Args:
        told: What the receipt tells of the checkpoint.
        folder: Where it was.

    Returns:
        Whether it is there, and all files are as the receipt has them.
    """
    what = f"checkpoint {folder.name}"
    try:
        there = {file.name for file in folder.files()}
        if not there:
            yield Check(what, "not reachable", f"there is no {folder}: deleted by retention?")
            return False
        if DAMAGED in there:
            yield Check(what, "differs", f"it was found damaged: see its {DAMAGED}")
            return False
        expected = {COMPLETE: {"sha256": told["sha256"]}, **told["files"]}
        differing = list(_differing(expected, folder, there))
    except StorageError as error:
        yield Check(what, "not reachable", str(error))
        return False
    yield from differing
    if not differing:
        size = sum(file["bytes"] for file in told["files"].values())
        yield Check(what, "ok", f"{len(expected)} files, {size / 1e6:,.1f} MB, each with its hash")
    return not differing


def export_checks(
    told: Receipt | None, backbone: str | None, checkpoint: Place | None
) -> Iterator[Check]:
    """Compare an export's files, and its weights with the checkpoint's.

    Args:
        told: What the receipt tells of it, if it was made with one.
        backbone: Where it is, if that was named.
        checkpoint: Folder of the checkpoint, if that is there and what it was.
    """
    if backbone is None:
        if told is not None:
            yield Check("backbone", "not reachable", "name its folder with --backbone")
        return
    folder = open_place(backbone)
    try:
        there = {file.name for file in folder.files()}
        if not there:
            yield Check("backbone", "not reachable", f"there is nothing at {folder}")
            return
        yield from _exported(told, folder, there)
        yield _weights(folder, there, checkpoint)
    except StorageError as error:
        yield Check("backbone", "not reachable", str(error))


def _exported(told: Receipt | None, folder: Place, there: set[str]) -> Iterator[Check]:
    if told is None:
        yield Check("backbone, its files", "note", "the receipt was made without a backbone")
        return
    differing = list(_differing(told["files"], folder, there))
    differing += [
        Check(f"{folder.name}/{name}", "differs", "expected no such file")
        for name in sorted(there - told["files"].keys())
    ]
    yield from differing
    if not differing:
        yield Check("backbone, its files", "ok", f"{len(there)} files, each with its hash")


def _weights(folder: Place, there: set[str], checkpoint: Place | None) -> Check:
    what = "backbone, its weights"
    if checkpoint is None:
        return Check(what, "not reachable", "the checkpoint is not there, or not what it was")
    if WEIGHTS not in there:
        return Check(what, "not reachable", f"{folder} has no {WEIGHTS}: no export for timm")
    try:
        differing = differing_weights(checkpoints.at(checkpoint.uri), folder)
    except StorageError:
        raise
    except DropposError as error:
        return Check(what, "differs", str(error))
    if differing:
        more = f", and {len(differing) - 1} more tensors" if len(differing) > 1 else ""
        return Check(what, "differs", f"{differing[0]}{more}")
    return Check(what, "ok", "bit for bit the checkpoint's")


def _differing(
    expected: Mapping[str, Mapping[str, Any]], folder: Place, there: set[str]
) -> Iterator[Check]:
    """Hash files again, and name those that are others, each by what differs first."""
    for name, file in expected.items():
        found = hashed(folder / name)._asdict() if name in there else {}
        for key, value in file.items():
            if found.get(key) != value:
                told = f"{key}: expected {value}, found {found.get(key, 'no file')}"
                yield Check(f"{folder.name}/{name}", "differs", told)
                break
