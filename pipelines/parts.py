"""The files of a checkpoint: what torch.distributed.checkpoint plans, as safetensors and JSON.

torch plans which rank writes and reads which shard, so that state loads at any world size.
Only the files are ours: torch's are pickles (its index, and every value that is no tensor),
and unpickling runs what the file tells it to, while a bucket may be written to by others.
safetensors and JSON run nothing, need no list of trusted classes that a release of torch
could break, and anyone can open a part with plain safetensors.

part-00000.safetensors
    What rank 0 wrote. A tensor that is whole has its own name, a shard `name@row,column` of
    its first element.
index.json
    Which tensor is made of which shards, and every value that is no tensor.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from math import prod
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from droppos.errors import TrainingError
from pipelines.checkpoints import INDEX, FileRecord
from pipelines.state_index import DTYPE_NAMES, Chunk, Index
from pipelines.storage import Place


class DamagedError(TrainingError):
    """A checkpoint's content is not what was written; an older one's may be."""


_BLOCK = 32 << 20
"""Bytes asked of storage at once; a tensor each request would be hundreds of small ones."""


class _Written(NamedTuple):
    """What a rank reports of one item: its place in a part and that part, or a value."""

    chunk: Chunk | None = None
    part: FileRecord | None = None
    value: Any = None


class PartWriter(StorageWriter):
    """Write one part each rank; rank 0 adds the index once every part is there."""

    def __init__(
        self,
        place: Place,
        starting: Callable[[], None],
        beside: Callable[[], None],
        moved: Callable[[], None],
        finished: Callable[[dict[str, FileRecord], int], bytes],
    ) -> None:
        """Prepare to write.

        Args:
            place: Folder of the checkpoint; what was in it is deleted.
            starting: Called on rank 0 before anything is deleted or written.
            beside: Called on each rank before it writes its part.
            moved: Called on each rank after each tensor of its part.
            finished: Called on rank 0 with all files and the world size, when all are written.
                What it returns reaches every rank as the saved metadata's storage_data.
        """
        self.place = place
        self.starting = starting
        self.beside = beside
        self.moved = moved
        self.finished = finished

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: a writer is made for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: who is first shows in what is called."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Write what torch planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Empty the folder while all ranks still wait for their plan, and number the parts."""
        self.starting()
        if self.place.exists():
            self.place.delete()
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors; values travel to rank 0 with the report."""
        self.beside()
        results = []
        tensors = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                content = planner.resolve_data(item)
                assert isinstance(content, BytesIO)
                value = json.loads(content.getvalue())
                results.append(WriteResult(item.index, 0, _Written(value=value)))
            else:
                tensors.append(item)
        if tensors:
            results += self._write_part(
                f"part-{plan.storage_data:05d}.safetensors", tensors, planner
            )
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_part(
        self, file: str, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        header, chunks = _layout(file, items)
        place = self.place / file
        digest = hashlib.sha256()
        with place.open_output() as stream:
            stream.write(header)
            digest.update(header)
            for item in items:
                # One tensor at a time leaves the device.
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                raw = _raw(tensor.detach().cpu().contiguous())
                stream.write(raw)
                digest.update(raw)
                self.moved()
        record = FileRecord(len(header) + sum(c.nbytes for c in chunks), digest.hexdigest())
        return [
            WriteResult(item.index, chunk.nbytes, _Written(chunk, record))
            for item, chunk in zip(items, chunks, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on rank 0: the reports of all ranks are the barrier before it."""
        files: dict[str, FileRecord] = {}
        chunks: dict[MetadataIndex, Chunk] = {}
        values: dict[str, Any] = {}
        for result in (result for of_rank in results for result in of_rank):
            written: _Written = result.storage_data
            if written.chunk and written.part:
                chunks[result.index] = written.chunk
                files[written.chunk.file] = written.part
            else:
                values[result.index.fqn] = written.value
        index = Index(metadata, chunks, values).to_json()
        (self.place / INDEX).write_bytes(index)
        files[INDEX] = FileRecord(len(index), hashlib.sha256(index).hexdigest())
        metadata.storage_data = self.finished(files, len(results))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept any: the place was opened before."""
        return True


class PartReader(StorageReader):
    """Read the shards this rank wants, and hash every file they are in."""

    def __init__(self, place: Place, files: Mapping[str, FileRecord]) -> None:
        """Read the index.

        Args:
            place: Folder of the checkpoint.
            files: What each file must be.

        Raises:
            DamagedError: If the index is not what was written.
        """
        self.place = place
        self.files = files
        text = (place / INDEX).read_bytes()
        self._check(INDEX, len(text), hashlib.sha256(text).hexdigest())
        try:
            self.index = Index.from_json(text, files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{place / INDEX} is damaged: {error!r}") from error

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: a reader is made for one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the index says."""
        return self.index.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the index was read already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Read what torch planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Read what torch planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each part once, from its first byte to its last."""
        wanted: dict[str, dict[Chunk, list[ReadItem]]] = defaultdict(lambda: defaultdict(list))
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                value = self.index.values[item.storage_index.fqn]
                planner.load_bytes(item, BytesIO(json.dumps(value).encode()))
            else:
                chunk = self.index.chunks[item.storage_index]
                wanted[chunk.file][chunk].append(item)
        for file, chunks in wanted.items():
            self._read_part(file, chunks, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_part(
        self, file: str, wanted: Mapping[Chunk, list[ReadItem]], planner: LoadPlanner
    ) -> None:
        """Copy and hash a file; both again where storage fails in passing."""

        def work(source: pa.NativeFile) -> str:
            digest = hashlib.sha256()
            position = 0
            self._check(file, source.size(), None)
            stream = pa.BufferedInputStream(source, _BLOCK)
            for chunk in sorted(wanted, key=lambda chunk: chunk.start):
                if chunk.start < position:
                    raise DamagedError(f"{self.place / INDEX} is damaged: shards overlap")
                _skim(stream, chunk.start - position, digest)
                shard = torch.empty(chunk.shape, dtype=chunk.dtype)
                raw = _raw(shard)
                stream.readinto(raw)
                digest.update(raw)
                position = chunk.start + chunk.nbytes
                for item in wanted[chunk]:
                    _copy(shard, item, planner)
            _skim(stream, self.files[file].bytes - position, digest)
            return digest.hexdigest()

        found = (self.place / file).read(work)
        self._check(file, self.files[file].bytes, found)

    def _check(self, file: str, size: int, sha256: str | None) -> None:
        expected = self.files[file]
        if size != expected.bytes:
            raise DamagedError(
                f"{self.place / file} is not what was written: expected {expected.bytes} bytes, "
                f"got {size}; resume from an older checkpoint, or restore the file"
            )
        if sha256 not in (None, expected.sha256):
            raise DamagedError(
                f"{self.place / file} is not what was written: expected sha256 "
                f"{expected.sha256}, got {sha256}; resume from an older checkpoint, or restore it"
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept any: the place was opened before."""
        return True


def _layout(file: str, items: list[WriteItem]) -> tuple[bytes, list[Chunk]]:
    """Lay tensors out one after another; the header is safetensors' own."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    laid: list[tuple[int, torch.dtype, tuple[int, ...]]] = []
    for item in items:
        data = item.tensor_data
        assert data is not None
        dtype, shape = data.properties.dtype, tuple(data.chunk.sizes)
        name = item.index.fqn
        if dtype not in DTYPE_NAMES:
            raise TrainingError(
                f"{name} in the state is {dtype}, which a checkpoint cannot hold; "
                f"expected one of {', '.join(map(str, DTYPE_NAMES))}"
            )
        if shape != tuple(data.size):
            name += "@" + ",".join(map(str, data.chunk.offsets))
        begin, end = end, end + prod(shape) * dtype.itemsize
        laid.append((begin, dtype, shape))
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [Chunk(file, len(header) + begin, dtype, shape) for begin, dtype, shape in laid]


def _raw(tensor: Tensor) -> memoryview:
    """Look at a contiguous CPU tensor as bytes; writing them writes the tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _skim(stream: pa.NativeFile, count: int, digest: "hashlib._Hash") -> None:
    while count > 0 and (block := stream.read(min(count, _BLOCK))):
        digest.update(block)
        count -= len(block)


def _copy(shard: Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        shard = shard.narrow(axis, start, length)
    target = planner.resolve_tensor(item).detach()
    target.copy_(shard)
    planner.commit_tensor(item, target)
