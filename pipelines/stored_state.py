"""The state in a checkpoint: written by all ranks together, read at any world size.

:mod:`pipelines.checkpoints` tells which checkpoints there are, and which of them count.
"""

import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from droppos.errors import DropposError, StorageError, TrainingError
from pipelines import chain
from pipelines.checkpoints import (
    COMPLETE,
    FOLDER,
    FORMAT,
    INDEX,
    FileRecord,
    Retention,
    Saved,
    newest,
    parse,
    prune,
)
from pipelines.parts import PartReader, PartWriter
from pipelines.retries import PATIENCE
from pipelines.state_index import PartLoadPlanner, PartSavePlanner, put
from pipelines.storage import Place, will_pass

APPEAR_S = 40.0
"""Seconds until a file that another node has written to an NFS is seen; 30 by Linux' defaults."""
COUNTS_S = 5.0
"""Seconds that the file that makes a checkpoint count is tried before it is asked again whether it
may."""

_log = logging.getLogger(__name__)


def save(
    home: Place,
    step: int,
    state: dict[str, Any],
    facts: Mapping[str, Any],
    retention: Retention,
    may_write: Callable[[], None] = lambda: None,
    beside: Callable[[], None] = lambda: None,
    moved: Callable[[], None] = lambda: None,
    group: dist.ProcessGroup | None = None,
) -> Saved:
    """Write a checkpoint; every rank of a process group calls this, or one process.

    A checkpoint of the same step is replaced. Afterwards older ones are deleted as `retention`
    has it, and what interrupted saves left. Of one that fails no part stays, which might fill the
    disk that was too full for it.

    Args:
        home: Folder of the run.
        step: Optimizer steps taken.
        state: Nested dicts of tensors (sharded ones too), numbers, strings, booleans, None,
            lists and tuples, as torch.distributed.checkpoint.state_dict makes them.
        facts: What complete.json tells besides, as JSON: `cursor` (epoch, batch, step, pictures),
            digests of recipe and manifest, seed, global batch, `metrics` of the held-out pictures,
            and `previous` (:mod:`pipelines.chain`).
        retention: Which older ones stay.
        may_write: Called on rank 0 before the first file, before each try to write the last, and
            before anything is deleted; what it raises before the last is raised on all ranks, and
            the checkpoint does not count.
        beside: Called on each rank when it is about to write its part, likewise.
        moved: Called on each rank after each tensor.
        group: The ranks; those of the default group when not given.

    Raises:
        DataError: If storage refuses.
        TrainingError: If the state holds something that cannot be kept.
    """
    place = home / FOLDER / f"step-{step:08d}"

    def finished(files: dict[str, FileRecord], world_size: int) -> bytes:
        if (lost := _await_files(place, files)) is not None:
            raise TrainingError(
                f"{place} lacks {lost}, which another worker has just written; is run.storage "
                "a folder that all nodes share? Take one, or s3://"
            )
        record = {
            "format": FORMAT,
            "step": step,
            "cursor": {},
            **facts,
            "world_size": world_size,
            "code": f"droppos {version('droppos')}",
            "torch": torch.__version__,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": {name: file._asdict() for name, file in files.items()},
        }
        text = json.dumps(record, indent=1).encode() + b"\n"
        chain.keep(home, chain.Link.of(text))
        _complete(place, text, may_write)
        return text

    first = not dist.is_initialized() or dist.get_rank() == 0
    try:
        with _one_error(f"checkpoint {place} cannot be written"):
            metadata = state_dict_saver.save(
                state,
                storage_writer=PartWriter(place, may_write, beside, moved, finished),
                planner=PartSavePlanner(),
                process_group=group,
            )
    except StorageError:
        if first:
            _if_allowed(may_write, lambda: _discard(place))
        raise
    if first:
        _if_allowed(may_write, lambda: prune(home, retention))
    return parse(place, metadata.storage_data)


def _await_files(place: Place, files: Mapping[str, FileRecord]) -> str | None:
    """Wait until all files are seen; name one that is not. A node may list an NFS from memory."""
    until = monotonic() + APPEAR_S
    while True:
        there = {entry.name: entry.size for entry in place.files()}
        lost = [name for name, file in files.items() if there.get(name) != file.bytes]
        if not lost or monotonic() > until:
            return lost[0] if lost else None
        sleep(1)


def _complete(place: Place, text: bytes, may_write: Callable[[], None]) -> None:
    """Let a checkpoint count, if it may at that moment: a request must not wait out a takeover."""
    until = monotonic() + PATIENCE
    while True:
        may_write()
        try:
            return (place / COMPLETE).write_bytes(text, COUNTS_S)
        except StorageError as error:
            if not will_pass(error) or monotonic() > until:
                raise


def _if_allowed(may_write: Callable[[], None], work: Callable[[], None]) -> None:
    """Delete something, unless another group writes here now: its parts do not count yet either."""
    try:
        may_write()
        work()
    except DropposError as error:
        _log.warning("what is of no use any more stays: %s", error)


def _discard(place: Place) -> None:
    """Delete what of a checkpoint takes room; its folder stays, for it was cut short, not lost."""
    (place / COMPLETE).delete()
    for entry in place.files():
        if entry.name != INDEX:
            (place / entry.name).delete()


def newest_for_all(home: Place, device: torch.device) -> Saved | None:
    """Find a run's newest checkpoint that counts; every rank of the process group calls this.

    Rank 0 looks, for all: one that is still being written would count for some and not for others,
    and each look is a listing.

    Args:
        home: Folder of the run.
        device: Where the process group speaks.
    """
    found = [newest(home) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, device=device)
    return found[0]


def load(saved: Saved, state: dict[str, Any]) -> None:
    """Read a checkpoint into `state`, in place, at this world size; every rank calls this.

    A file is hashed while it is read, so a wrong one is found after its tensors were copied:
    when this raises, `state` is a mixture, to be thrown away or loaded again.

    Args:
        saved: What to read.
        state: As given to `save`, with this run's shapes and sharding. Top-level keys that
            are left out are not read.

    Raises:
        DataError: If storage refuses.
        DamagedError: If a file is not what was written.
        TrainingError: If the state does not fit.
    """
    with _one_error(f"checkpoint {saved.uri} cannot be loaded"):
        reader = PartReader(saved.place, saved.files)
        state_dict_loader.load(state, storage_reader=reader, planner=PartLoadPlanner())


def load_full(saved: Saved, only: Collection[str] | None = None) -> dict[str, Any]:
    """Read whole tensors onto the CPU of this one process, whatever the world size that saved.

    Args:
        saved: What to read.
        only: Top-level keys to read, such as `{"model"}`; all when none.

    Returns:
        The nested state that was saved.

    Raises:
        DataError: If storage refuses.
        DamagedError: If a file is not what was written.
    """
    with _one_error(f"checkpoint {saved.uri} cannot be loaded"):
        reader = PartReader(saved.place, saved.files)
        paths = {
            name: path
            for name, path in reader.index.metadata.planner_data.items()
            if only is None or path[0] in only
        }
        flat: dict[str, Any] = {name: reader.index.empty(name) for name in paths}
        # no_dist: one rank of a group may read without the others.
        state_dict_loader.load(flat, storage_reader=reader, planner=PartLoadPlanner(), no_dist=True)
    tree: dict[str, Any] = {}
    for name, path in paths.items():
        put(tree, path, flat[name])
    return tree


@contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Turn torch's bundle of every rank's failures into the one error a person needs."""
    try:
        with warnings.catch_warnings():
            # One process without a group is a way to run, not an oversight.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, DropposError):
                raise type(cause)(f"{what}: {cause}") from None
        # A BaseException such as KeyboardInterrupt passes as what it is.
        if not isinstance(causes[0], Exception):
            raise causes[0] from error
        raise TrainingError(f"{what}: {type(causes[0]).__name__}: {causes[0]}") from error
