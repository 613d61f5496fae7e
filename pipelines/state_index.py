"""What a checkpoint's index.json says, and the JSON of values that are no tensors.

torch.distributed.checkpoint describes state by names, boxes and paths; this is its
description written without pickle, and read back with nothing believed that points outside
the checkpoint's files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    WriteItem,
    WriteItemType,
)

from droppos.errors import TrainingError
from pipelines.checkpoints import FileRecord

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By safetensors' names."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Chunk(NamedTuple):
    """A shard, or a whole tensor, and where its bytes begin in a part."""

    file: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the part."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Index:
    """What index.json says."""

    metadata: Metadata
    """torch's description; planner_data has each name's path in the nested state."""
    chunks: Mapping[MetadataIndex, Chunk]
    values: Mapping[str, Any]
    """Values that are no tensors, as JSON (see `_encode`)."""

    def empty(self, name: str) -> Tensor | None:
        """Make room for a tensor; None for a value, which needs none."""
        match self.metadata.state_dict_metadata[name]:
            case TensorStorageMetadata(properties=properties, size=size):
                return torch.empty(size, dtype=properties.dtype)
        return None

    def to_json(self) -> bytes:
        """Write it down."""
        tensors: dict[str, Any] = {}
        for name, meta in self.metadata.state_dict_metadata.items():
            if isinstance(meta, TensorStorageMetadata):
                chunks = [
                    (c.offsets, self.chunks[MetadataIndex(name, c.offsets)]) for c in meta.chunks
                ]
                tensors[name] = {
                    "path": self.metadata.planner_data[name],
                    "dtype": DTYPE_NAMES[meta.properties.dtype],
                    "shape": list(meta.size),
                    "chunks": [
                        {"offset": list(at), "shape": c.shape, "file": c.file, "start": c.start}
                        for at, c in chunks
                    ],
                }
        values = {
            name: {"path": self.metadata.planner_data[name], "value": value}
            for name, value in self.values.items()
        }
        return json.dumps({"tensors": tensors, "values": values}).encode()

    @classmethod
    def from_json(cls, text: bytes, files: Mapping[str, FileRecord]) -> "Index":
        """Read what `to_json` wrote, and believe nothing that points outside the files.

        Raises:
            ValueError, KeyError, TypeError: If it was not written by `to_json`.
        """
        said = json.loads(text)
        described: dict[str, Any] = {}
        chunks: dict[MetadataIndex, Chunk] = {}
        for name, tensor in said["tensors"].items():
            dtype = DTYPES[tensor["dtype"]]
            boxes = []
            for box in tensor["chunks"]:
                offset, shape = torch.Size(box["offset"]), torch.Size(box["shape"])
                chunk = Chunk(box["file"], box["start"], dtype, tuple(shape))
                if not 0 <= chunk.start <= files[chunk.file].bytes - chunk.nbytes:
                    raise ValueError(f"{name} lies outside {chunk.file}")
                chunks[MetadataIndex(name, offset)] = chunk
                boxes.append(ChunkStorageMetadata(offset, shape))
            size = torch.Size(tensor["shape"])
            described[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, boxes)
        described |= {name: BytesStorageMetadata() for name in said["values"]}
        paths = {
            name: tuple(entry["path"]) for name, entry in (said["tensors"] | said["values"]).items()
        }
        values = {name: entry["value"] for name, entry in said["values"].items()}
        return cls(Metadata(described, planner_data=paths), chunks, values)


class PartSavePlanner(DefaultSavePlanner):
    """torch's plan of who writes what, with JSON for values that are no tensors."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Turn what is no tensor into bytes; torch would pickle it."""
        if write_item.type != WriteItemType.BYTE_IO:
            return object
        return BytesIO(json.dumps(_encode(object, write_item.index.fqn)).encode())


class PartLoadPlanner(DefaultLoadPlanner):
    """torch's plan of who reads what, with JSON for values, and nothing left over."""

    def create_local_plan(self) -> LoadPlan:
        """Hold names against each other first: torch lets a deeper model's state pass."""
        assert self.metadata is not None
        paths = self.metadata.planner_data
        ours = set(self.state_dict)
        asked = {path[0] for path in self.mappings.values()}
        theirs = {name for name, path in paths.items() if path[0] in asked}
        for names, where in ((ours - set(paths), "this run"), (theirs - ours, "the checkpoint")):
            if names:
                raise TrainingError(
                    f"only {where} has {min(names)} ({len(names)} such); "
                    "resume with the model and optimizer it was made with"
                )
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Set what is no tensor; torch would unpickle it."""
        path = self.mappings[read_item.dest_index.fqn]
        put(self.original_state_dict, path, _decode(json.load(value)))


def put(tree: dict[str, Any], path: tuple[str | int, ...], value: Any) -> None:
    """Set a value in nested dicts and lists, which grow as needed; an integer is a list's index."""
    holder: Any = {"": tree}
    here: Any = ""
    for key in path:
        if holder[here] is None:
            holder[here] = [] if isinstance(key, int) else {}
        holder, here = holder[here], key
        if isinstance(holder, list):
            holder.extend([None] * (int(key) + 1 - len(holder)))
        else:
            holder.setdefault(key, None)
    holder[here] = value


def _encode(value: Any, name: str) -> Any:
    """Turn a value into JSON that remembers which lists were tuples."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_encode(item, name) for item in value]
        case tuple():
            return {"tuple": [_encode(item, name) for item in value]}
        case dict():
            return {"dict": {str(key): _encode(item, name) for key, item in value.items()}}
    raise TrainingError(
        f"{name} in the state is a {type(value).__name__}, which a checkpoint cannot hold; "
        "expected tensors, numbers, strings, booleans, None, and lists, tuples or dicts of them"
    )


def _decode(value: Any) -> Any:
    match value:
        case list():
            return [_decode(item) for item in value]
        case {"tuple": items}:
            return tuple(_decode(item) for item in items)
        case {"dict": items}:
            return {key: _decode(item) for key, item in items.items()}
    return value
