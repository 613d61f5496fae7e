"""Checkpoints: which ones a run has, which of them count, and how long they stay.

Layout below a run's home::

    checkpoints/step-00000120/
        part-00000.safetensors   tensors, or shards of them, that rank 0 wrote
        part-00001.safetensors   ...
        index.json               which tensor is made of which shards, and all that is no tensor
        complete.json            written last, by rank 0, when every part is there: step, cursor,
                                 facts, and size and sha256 of every file above
    chain/                       a copy of each complete.json (:mod:`pipelines.chain`)

Without its complete.json, or with a file of another size than that names, a checkpoint does
not count: it is never loaded, and goes with the next save. One whose content turns out to be
another than its hashes say is marked with damaged.json, and counts no more either.
:mod:`pipelines.parts` has the files, and why they are not torch's own;
:mod:`pipelines.stored_state` reads and writes them, :mod:`pipelines.saver` in the background.

Imports no torch: whoever only looks for the newest one should not wait for it.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, NamedTuple

from droppos.errors import DataError, TrainingError
from pipelines import chain, history
from pipelines.recipe import Run
from pipelines.storage import Place, open_place, open_reachable

FOLDER = "checkpoints"
INDEX = "index.json"
COMPLETE = "complete.json"
DAMAGED = "damaged.json"
"""What complete.json is renamed to when a file is not what was written."""
FORMAT = "droppos-checkpoint/1"

COPIED_AT_ONCE = HASHED_AT_ONCE = 8 * 2**20
"""Bytes."""

_log = logging.getLogger(__name__)


class FileRecord(NamedTuple):
    """What one file of a checkpoint must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that counts: its last file is there, and every file has the size it names."""

    place: Place
    """Folder of the checkpoint."""
    step: int
    """Optimizer steps taken when it was saved."""
    cursor: Mapping[str, int]
    """Where the stream goes on: epoch, batch, step, and pictures of that epoch trained on."""
    files: Mapping[str, FileRecord]
    """Every file but complete.json."""
    record: Mapping[str, Any]
    """All of complete.json: besides these, world size, versions, time, and `save`'s facts."""
    sha256: str
    """Hash of complete.json, which names the hash of every other file."""

    @property
    def uri(self) -> str:
        """Folder of the checkpoint."""
        return self.place.uri

    @property
    def home(self) -> Place:
        """Folder of its run."""
        return open_place(self.uri.removesuffix(f"/{FOLDER}/{self.place.name}"))

    @property
    def size(self) -> int:
        """Bytes of all its files but complete.json."""
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints stay when a newer one counts."""

    newest: int
    """So many of the newest."""
    every: int | None = None
    """Each whose step is a multiple of this."""
    best: str | None = None
    """The one with the best of this metric, which `save` was told in facts["metrics"]."""
    smallest: bool = False
    """Whether the smallest is the best."""

    def kept(self, known: Sequence[Saved]) -> set[int]:
        """Choose the steps that stay.

        Args:
            known: All checkpoints that count, newest first.
        """
        kept = {saved.step for saved in known[: self.newest]}
        if self.every is not None:
            kept |= {saved.step for saved in known if saved.step % self.every == 0}
        if self.best is not None:
            sign = -1 if self.smallest else 1
            scores = [
                (sign * saved.record["metrics"][self.best], saved.step)
                for saved in known
                if isfinite(saved.record.get("metrics", {}).get(self.best, nan))
            ]
            kept |= {max(scores)[1]} if scores else set()
        return kept


def require_recipe(saved: Saved) -> None:
    """Refuse a checkpoint that is of no pre-training, so that its model is not known.

    Raises:
        DataError: If it names no recipe.
    """
    if "finetune" in saved.record:
        raise DataError(
            f"checkpoint {saved.uri} is of a fine-tuned classifier, which `droppos export` writes "
            "for others to load; evaluated, reported and audited are pre-trainings: name the one "
            "it began with, which MLflow has as the run's tag finetune.backbone"
        )
    if "recipe" not in saved.record:
        raise DataError(
            f"checkpoint {saved.uri} names no recipe, so its model is unknown; "
            "was it written by droppos pretrain?"
        )


def newest(home: Place, *, look_again: bool = True) -> Saved | None:
    """Find a run's newest checkpoint that counts; newer ones that don't are named in the log.

    Args:
        home: Folder of the run.
        look_again: Once more if one goes meanwhile, for its run has just made a newer one.
    """
    for place in _folders(home):
        try:
            return _open(place)
        except TrainingError as error:
            if look_again and not place.exists():
                return newest(home, look_again=False)
            _log.warning("checkpoint passed over: %s", error)
    return None


def at(uri: str) -> Saved:
    """Find the checkpoint a person means: its folder, a run's home, or the folder between.

    Raises:
        DataError: If there is none that counts; the message says what is there instead.
    """
    place = open_reachable(uri)
    found = place.children()
    if not found:
        run = place.uri.rpartition(f"/{FOLDER}/")[0]
        there = [folder.name for folder in _folders(open_place(run))] if run else []
        beside = f"; its run has {', '.join(there)}" if there else ""
        if "/" not in uri and (usual := open_place(f"{Run().storage}/{uri}")).children():
            beside = f"; did you mean {Run().storage}/{usual.name}?"
        raise DataError(
            f"{uri} has no checkpoint: there is nothing{beside}; name the folder of a run, or "
            "of a checkpoint of it (`droppos runs` lists runs, and where they are)"
        )
    if COMPLETE in found or INDEX in found or re.fullmatch(r"step-\d+", place.name):
        try:
            return _open(place)
        except TrainingError as error:
            raise DataError(f"{error}; take an older checkpoint of the run") from error
    home = open_place(place.uri.removesuffix(f"/{FOLDER}"))
    saved = newest(home)
    if saved is None:
        unfinished = [folder.name for folder in _folders(home)]
        listed = ", ".join((unfinished or found)[:5]) or "nothing"
        raise DataError(
            f"{uri} has no checkpoint: found {'only unfinished ' * bool(unfinished)}{listed}; "
            f"expected a run's folder with {FOLDER}/ in it, or one folder of that with {COMPLETE}"
        )
    return saved


def prune(home: Place, retention: Retention) -> None:
    """Delete all checkpoints that need not stay, and everything that does not count.

    Only a run's one writer may call this, and not during a save. Storage that refuses is a
    warning: a checkpoint too many is better than a run less.
    """
    try:
        folders = {place: _counting(place) for place in _folders(home)}
    except DataError as error:
        _log.warning("old checkpoints stay: %s", error)
        return
    kept = retention.kept([saved for saved in folders.values() if saved is not None])
    for place, saved in folders.items():
        if saved is not None and saved.step in kept:
            continue
        try:
            # The last file goes first: a deletion cut short must not leave what looks whole.
            (place / COMPLETE).delete()
            place.delete()
        except DataError as error:
            _log.warning("old checkpoint stays: %s", error)


def adopt(home: Place, saved: Saved) -> None:
    """Make a checkpoint of another run the newest of this one; what was as new or newer is deleted.

    Its history comes with it, in place of this run's own.

    Nobody may write the run meanwhile.

    Raises:
        DataError: If a file cannot be copied.
    """
    for place in _folders(home):
        if int(place.name.removeprefix("step-")) >= saved.step:
            (place / COMPLETE).delete()
            place.delete()
    copy = home / FOLDER / saved.place.name
    for name in saved.files:
        _copy(saved.place / name, copy / name)
    chain.bring(saved.home, chain.Link.of((saved.place / COMPLETE).read_bytes()), home)
    history.bring(saved.home, saved.step, home)
    _copy(saved.place / COMPLETE, copy / COMPLETE)  # the last: what is cut short must not count


def _copy(file: Place, copy: Place) -> None:
    with file.open_input() as source, copy.open_output() as target:
        shutil.copyfileobj(source, target, COPIED_AT_ONCE)


def set_aside(saved: Saved, why: str) -> None:
    """Let a checkpoint count no more: its files are not what was written.

    Raises:
        DataError: If storage refuses.
    """
    record = {**saved.record, "damage": why}
    (saved.place / DAMAGED).write_bytes(json.dumps(record, indent=1).encode() + b"\n")
    (saved.place / COMPLETE).delete()
    _log.warning("checkpoint %s is damaged and counts no more: %s", saved.place, why)


def hashed(place: Place) -> FileRecord:
    """Give size and hash of a file.

    Raises:
        DataError: If it is missing.
        StorageError: If storage refuses.
    """

    def work(source: Any) -> FileRecord:
        found, size = hashlib.sha256(), 0
        while piece := source.read(HASHED_AT_ONCE):
            found.update(piece)
            size += len(piece)
        return FileRecord(size, found.hexdigest())

    return place.read(work)


def lost(home: Place) -> int | None:
    """Find the newest checkpoint that counted once and is gone, or damaged, if there is one.

    One that was cut short when it was about to count is none. Nor is a run's first one while it is
    the only one: to begin again costs no more than before it.
    """
    there = {place.name: place for place in _folders(home)}
    made = chain.steps(home)
    for step in sorted(made, reverse=True) if len(made) > 1 else ():
        place = there.get(f"step-{step:08d}")
        if place is None or DAMAGED in place.children():
            return step
    return None


def set_aside_if_damaged(home: Place, why: str) -> None:
    """Look whether the newest checkpoint, which workers found damaged, is; then it counts no more.

    If each file is as it was written, a machine has read it wrongly: its memory may be bad.

    Args:
        home: Folder of the run.
        why: What the workers found.

    Raises:
        DataError: If storage refuses.
    """
    saved = newest(home)
    if saved is None:
        return
    if any(hashed(saved.place / name) != file for name, file in saved.files.items()):
        set_aside(saved, why)
    else:
        _log.warning("%s was read wrongly (%s), and is as it was written", saved.place, why)


def _folders(home: Place) -> list[Place]:
    """Folders of checkpoints, newest first, whether they count or not."""
    folder = home / FOLDER
    steps = [name for name in folder.children() if re.fullmatch(r"step-\d+", name)]
    return [folder / name for name in sorted(steps, key=lambda name: int(name[5:]), reverse=True)]


def _open(place: Place) -> Saved:
    """Read complete.json and hold it against the listing.

    Raises:
        TrainingError: If the checkpoint does not count.
    """
    sizes = {entry.name: entry.size for entry in place.files()}
    if DAMAGED in sizes:
        raise TrainingError(f"{place} was found damaged: see its {DAMAGED}")
    if COMPLETE not in sizes:
        raise TrainingError(f"{place} is unfinished: it has no {COMPLETE}")
    saved = parse(place, (place / COMPLETE).read_bytes())
    for name, expected in saved.files.items():
        if sizes.get(name) != expected.bytes:
            raise TrainingError(
                f"{place / name} is damaged: expected {expected.bytes} bytes, "
                f"got {sizes.get(name, 'no file')}"
            )
    return saved


def parse(place: Place, text: bytes) -> Saved:
    """Read complete.json.

    Raises:
        TrainingError: If it is not what was written.
    """
    try:
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return Saved(
            place=place,
            step=int(record["step"]),
            cursor=dict(record["cursor"]),
            files={name: FileRecord(**file) for name, file in record["files"].items()},
            record=record,
            sha256=hashlib.sha256(text).hexdigest(),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{place / COMPLETE} is damaged: {error!r}") from error


def _counting(place: Place) -> Saved | None:
    try:
        return _open(place)
    except TrainingError:
        return None
