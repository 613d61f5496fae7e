"""Features of a whole data set: taken once, by as many workers as there are, and kept.

The pictures are parted into pieces of some row groups. A worker reads a piece, decodes the centres
of its pictures and runs the encoder; what comes back is a few kilobytes a picture. So no process
holds the pixels of more than two pieces, and only features of the whole set are ever in one memory.

Layout of what is kept, below a folder::

    a1b2c3d4e5f60718/        hash of the encoder's weights and heads, the data, and what was taken
        part-00000.npz       features, keys and labels of the first piece
        part-00001.npz       ...

A part appears whole or not at all, so an evaluation that was interrupted goes on with what is
there, and one that asks for the same features again reads them.
"""

import hashlib
import io
import json
import logging
import os
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Float, Int, UInt8
from ray.exceptions import RayActorError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppos.errors import ConfigError, DataError, TrainingError
from droppos.measure.features import extract_features
from droppos.pictures import center_crop
from pipelines.cluster import join_standing, result_of, standing_address, start_private
from pipelines.holdout import Chosen, choose, read_chosen
from pipelines.machines import read_cluster
from pipelines.resources import Demand
from pipelines.shards import Manifest, Picture, load_manifest
from pipelines.spread import Spread
from pipelines.storage import Place, open_place, open_reachable

PIECE = 512
"""Pictures of a piece, at least; it ends with a row group. 77 MB of pixels at 224 x 224."""
AHEAD = 2
"""Pieces a worker has at once: one is read and decoded while the encoder is busy with the other."""
RESTARTS = 3
"""Times a lost worker is started again."""
FORMAT = "droppos features 3"

Piece = list[Chosen]
Columns = dict[str, np.ndarray]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Extracted:
    """What is known of the pictures of a data set, in its order."""

    features: Float[Tensor, "P D"]
    """Means of the patch tokens after the last norm, on the CPU; `extract_features`."""
    keys: list[str]
    labels: Int[Tensor, " P"] | None
    """Class of each picture, -1 for one without; None where no picture has any."""
    classes: tuple[str, ...] | None


def extract(
    encoder: VisionTransformer,
    uri: str,
    size: tuple[int, int],
    *,
    blocks: int = 1,
    limit: int | None = None,
    spread: Spread = Spread(),  # noqa: B008 - frozen
) -> Extracted:
    """Take the features of a prepared data set.

    Args:
        encoder: On the CPU, in eval mode.
        uri: The data set.
        size: Height and width of the encoder's pictures, in pixels.
        blocks: Last blocks of the encoder whose means are put side by side.
        limit: Pictures to take, from row groups all over the data set; all when not given.
        spread: Who takes them, and where they are kept.

    Raises:
        ConfigError: If so many workers have no room, or the encoder has not so many blocks.
        DataError: If there are no pictures, or one that was good when prepared is no longer.
        TrainingError: If workers are lost again and again.
    """
    place = open_reachable(uri)
    manifest = load_manifest(place)
    pieces = pieces_of(choose(manifest, limit))
    if not pieces:
        raise DataError(f"{uri} holds no picture; prepare a folder that has some")
    kept = None
    if spread.cache is not None:
        kept = open_place(spread.cache) / _digest(encoder, manifest, size, blocks, limit)[:16]
    found = {} if kept is None else _read_kept(kept, pieces)
    left = {number: piece for number, piece in enumerate(pieces) if number not in found}
    if left:
        task = _Task(encoder, place, manifest, size, blocks)
        with _extractors(task, spread, len(left)) as extractors:
            for number, columns in extractors.take(left):
                if kept is not None:
                    _write(kept / _name(number), columns)
                found[number] = columns
    return _joined([found[number] for number in range(len(pieces))], manifest)


def pieces_of(chosen: Sequence[Chosen]) -> list[Piece]:
    """Put row groups together until they are worth a task."""
    pieces: list[Piece] = []
    for part in chosen:
        if not pieces or sum(len(each.rows) for each in pieces[-1]) >= PIECE:
            pieces.append([])
        pieces[-1].append(part)
    return pieces


def _joined(parts: Sequence[Columns], manifest: Manifest) -> Extracted:
    labels = torch.from_numpy(np.concatenate([part["labels"] for part in parts]))
    labelled = manifest.classes is not None and bool((labels >= 0).any())
    return Extracted(
        features=torch.from_numpy(np.concatenate([part["features"] for part in parts])),
        keys=[str(key) for part in parts for key in part["keys"]],
        labels=labels if labelled else None,
        classes=manifest.classes,
    )


def _digest(
    encoder: VisionTransformer,
    manifest: Manifest,
    size: tuple[int, int],
    blocks: int,
    limit: int | None,
) -> str:
    """Hash all that decides the features, and the way they are parted."""
    heads = heads_of(encoder)  # weights of another project don't tell them
    told = [FORMAT, manifest.digest, size, blocks, limit, PIECE, heads]
    digest = hashlib.sha256(json.dumps(told).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def heads_of(encoder: VisionTransformer) -> list[int]:
    """Tell the attention heads of each block, which no weight's shape does."""
    attentions: list[Any] = [block.attn for block in encoder.blocks]
    return [attention.num_heads for attention in attentions]


def _name(number: int) -> str:
    return f"part-{number:05d}.npz"


def _write(place: Place, columns: Columns) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **columns)
    place.write_bytes(buffer.getvalue())


def _read_kept(kept: Place, pieces: Sequence[Piece]) -> dict[int, Columns]:
    """Read the parts that are there; one that is damaged is taken again."""
    there = set(kept.children())
    found = {}
    for number, piece in enumerate(pieces):
        if _name(number) not in there:
            continue
        try:
            with np.load(io.BytesIO((kept / _name(number)).read_bytes())) as file:
                columns = {name: file[name] for name in ("features", "keys", "labels")}
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _log.warning("%s is damaged, and taken again: %s", kept / _name(number), error)
            continue
        if len(columns["keys"]) == sum(len(part.rows) for part in piece):
            found[number] = columns
    return found


def decode(
    place: Place,
    manifest: Manifest,
    piece: Piece,
    size: tuple[int, int],
    threads: ThreadPoolExecutor,
) -> tuple[list[Picture], UInt8[Tensor, "P rows columns 3"]]:
    """Read a piece and cut the centres of its pictures, in several threads."""
    rows = [row for part in piece for row in read_chosen(place, manifest, part)]
    crops = threads.map(lambda row: center_crop(row.image, size), rows)
    return rows, torch.from_numpy(np.stack(list(crops)))


@dataclass(frozen=True, slots=True)
class _Task:
    """What features are taken of, and by what."""

    encoder: VisionTransformer
    place: Place
    manifest: Manifest
    size: tuple[int, int]
    blocks: int


class _Extractor:
    """Takes features, in the process and on the device where it was made."""

    def __init__(self, task: _Task, device: str, cpus: int) -> None:
        self._task = task
        self._encoder = task.encoder.to(device)
        self._decoders = ThreadPoolExecutor(cpus, thread_name_prefix="decode")

    def part(self, piece: Piece) -> Columns:
        """Read, decode and encode one piece."""
        task = self._task
        rows, pixels = decode(task.place, task.manifest, piece, task.size, self._decoders)
        labels = [-1 if row.label is None else row.label for row in rows]
        return {
            "features": extract_features(self._encoder, pixels, blocks=task.blocks).numpy(),
            "keys": np.array([row.key for row in rows]),
            "labels": np.array(labels, dtype=np.int64),
        }

    def take(self, left: dict[int, Piece]) -> Iterator[tuple[int, Columns]]:
        """Take one piece after another."""
        for number, piece in left.items():
            yield number, self.part(piece)


class _Worker(_Extractor):
    """The same, in a process of Ray's."""

    def __init__(self, held: Sequence[Any], device: str, cpus: int) -> None:
        """Fetch encoder and data set.

        Args:
            held: A reference to the task, in a list: Ray would fetch it as an argument only once,
                and warns that an actor may not restart.
            device: As of `_Extractor`.
            cpus: As of it.
        """
        torch.set_num_threads(cpus)
        super().__init__(ray.get(held[0]), device, cpus)


class _Crew:
    """The same, in many processes."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors

    def take(self, left: dict[int, Piece]) -> Iterator[tuple[int, Columns]]:
        """Take the pieces, in whatever order they are done."""
        waiting = deque(left.items())
        free = deque(actor for _ in range(AHEAD) for actor in self._actors)
        under_way: dict[Any, tuple[Any, int]] = {}
        while waiting or under_way:
            while waiting and free:
                actor, (number, piece) = free.popleft(), waiting.popleft()
                under_way[actor.part.remote(piece)] = actor, number
            (done, *_), _ = ray.wait(list(under_way))
            actor, number = under_way.pop(done)
            free.append(actor)
            try:
                yield number, result_of(done)
            except RayActorError as error:
                raise TrainingError(
                    f"a worker that took features was lost {RESTARTS + 1} times ({error}); has it "
                    "memory enough? Give each more --cpus-per-worker, so that fewer share a "
                    "machine; what was taken is kept in --cache"
                ) from error


@contextmanager
def _extractors(task: _Task, spread: Spread, pieces: int) -> Iterator[_Extractor | _Crew]:
    """Make what takes features; a cluster that was joined or started for it is left after."""
    if spread.workers is None and not standing_address():
        cpus = spread.cpus_per_worker or os.cpu_count() or 1
        try:
            yield _Extractor(task, _own_device(spread), cpus)
        finally:
            task.encoder.cpu()
        return
    joined = not ray.is_initialized()
    if joined and standing_address():
        join_standing()
    elif joined:
        pixels = 3 * prod(task.size) * PIECE
        start_private((spread.workers or 1) * (spread.cpus_per_worker or 1), held=pixels)
    try:
        workers, cpus, gpu = _room(spread, pieces)
        held = [ray.put(task)]
        actor = ray.remote(_Worker).options(
            num_cpus=cpus,
            num_gpus=int(gpu),
            max_concurrency=AHEAD,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy="SPREAD",
        )
        device = "cuda" if gpu else "cpu"
        yield _Crew([actor.remote(held, device, cpus) for _ in range(workers)])
    finally:
        if joined:
            ray.shutdown()


def _own_device(spread: Spread) -> str:
    if spread.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return spread.device


def _room(spread: Spread, pieces: int) -> tuple[int, int, bool]:
    """Choose how many workers, the CPUs of each, and whether it has a GPU.

    Raises:
        ConfigError: If so many will never have room.
    """
    has = ray.cluster_resources()
    gpu = spread.device == "cuda" or (spread.device == "auto" and has.get("GPU", 0) >= 1)
    cluster = read_cluster()
    shares = [machine.cpus // machine.gpus for machine in cluster.machines if machine.gpus]
    cpus = spread.cpus_per_worker or max(1, min(shares, default=1) if gpu else 1)
    demand = Demand(cpus_per_worker=cpus, gpu=gpu)
    now, most = (
        sum(machine.count * demand.bundles(machine) for machine in machines)
        for machines in (cluster.standing, cluster.machines)
    )
    workers = spread.workers or now or 1
    if workers > most:
        each = f"{cpus} CPU" + (" and a GPU" if gpu else "")
        raise ConfigError(
            f"--workers {workers}, each with {each}: the cluster has room for {most} at its "
            "largest; take fewer, or fewer --cpus-per-worker"
        )
    return min(workers, pieces), cpus, gpu
