"""Gauges of memory for tests on a CPU: what autograd keeps, and the most that is alive at once."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Kept:
    """Storages that autograd packed, each once, and held so that no address comes back."""

    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def kept_for_backward(without: set[int]) -> Iterator[Kept]:
    """Gather what is saved for the backward pass, but for the storages at these addresses."""
    kept = Kept()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in without:
            kept.storages.setdefault(storage._cdata, storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, as long as they live.

    What an operation uses inside itself is not seen. Sizes are looked at after each operation:
    FSDP2 frees and fills the storages of gathered weights without one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def begin_with(self, *tensors: torch.Tensor) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        there = [storage() for storage in self._alive.values()]
        self.peak = max(self.peak, sum(each.nbytes() for each in there if each is not None))
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._alive.pop(key, None))
