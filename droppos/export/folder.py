"""The folder of an export: it appears whole or not at all, and replaces only its like.

Every format's folder holds ``droppos.json`` beside the files its users expect: what the model is,
which format this is, and which files belong to it.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from droppos.errors import ConfigError, DataError

OWN_CONFIG = "droppos.json"
VERSION = "droppos export 2"


def refuse_foreign(out: str, found: Collection[str], own: bytes | None) -> None:
    """Let only a new folder, an empty one or a previous export be written over.

    Args:
        out: The folder, for the message.
        found: Names in it.
        own: Its droppos.json, if there is one.

    Raises:
        ConfigError: Naming what would be lost.
    """
    foreign = set(found) - _files_of(own)
    if foreign:
        raise ConfigError(
            f"{out} is not a previous export, so it is not replaced: it holds "
            f"{', '.join(sorted(foreign)[:3])}; name a new or empty folder"
        )


def _files_of(own: bytes | None) -> set[str]:
    """List the files that a previous export says are its own; none if it is not ours."""
    try:
        said = json.loads(own or b"")
        return set(said["files"]) if said["format"] == VERSION else set()
    except (ValueError, KeyError, TypeError):
        return set()


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of ``out`` if the block ends well.

    Killed between the two renames, the previous export still lies beside, under a hidden name.

    Raises:
        ConfigError: If ``out`` holds anything but a previous export.
    """
    if out.is_dir():
        own = out / OWN_CONFIG
        names = [file.name for file in out.iterdir()]
        refuse_foreign(str(out), names, own.read_bytes() if own.is_file() else None)
    elif out.exists():
        refuse_foreign(str(out), [out.name], None)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}-{uuid4().hex}"
    draft.mkdir()
    try:
        yield draft
        previous = draft.with_name(f"{draft.name}-previous")
        if out.exists():
            out.rename(previous)
        draft.rename(out)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_own(folder: Path, about: Mapping[str, Any]) -> None:
    """Write droppos.json: what ``about`` says, and all files that are there."""
    files = sorted({OWN_CONFIG, *(file.name for file in folder.iterdir())})
    write_json(folder / OWN_CONFIG, {"format": VERSION, **about, "files": files})


def unfinished(files: Iterable[str]) -> bytes:
    """Make a droppos.json of a folder whose files are being replaced; nobody loads that."""
    said = {"format": VERSION, "unfinished": True, "files": sorted({OWN_CONFIG, *files})}
    return json.dumps(said, indent=2).encode() + b"\n"


def read_own(folder: Path) -> dict[str, Any]:
    """Read droppos.json.

    Raises:
        DataError: If it is not what `write_own` writes.
    """
    own = read_json(folder / OWN_CONFIG)
    if not isinstance(own, dict) or own.get("format") != VERSION:
        found = own.get("format") if isinstance(own, dict) else own
        raise DataError(
            f"{folder / OWN_CONFIG} says format {found!r}, expected {VERSION!r}; "
            "is it another thing, or from another version? Export again from the checkpoint"
        )
    if own.get("unfinished"):
        raise DataError(f"{folder} holds an export that was cut short; export again")
    return own


def write_json(path: Path, value: object) -> None:
    """Write a value as a person would like to read it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file of an export.

    Raises:
        DataError: If it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); expected the folder that "
            "`droppos export CHECKPOINT OUT` wrote"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); export again from the checkpoint"
        ) from error


def plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy weights to float32 on the CPU, each in memory of its own."""
    # Safetensors refuses memory that is shared or strided.
    return {
        name: value.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, value in state.items()
    }


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write safetensors."""
    save_file(weights, path, metadata={"format": "pt"})  # Hugging Face's loaders look for that


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read safetensors of an export.

    Raises:
        DataError: If the file is missing or torn.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be read as safetensors ({error}); is the export complete? "
            "Export again from the checkpoint"
        ) from error
