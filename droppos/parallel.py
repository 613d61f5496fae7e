"""Spreading a model over devices: the one visible place for strategy, precision and memory.

The same model code serves all strategies. They are applied in this order: activation
checkpointing (inside a block), compilation (of a block), sharding or replication (around it).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from math import gcd
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from droppos.config import Compute, Method, Model, require
from droppos.errors import ConfigError
from droppos.model import DropPos


def resolve_device(compute: Compute) -> torch.device:
    """Choose the device of this process: of several GPUs the one its launcher made current.

    Raises:
        ConfigError: If a GPU is asked for and this process sees none.
    """
    available = torch.cuda.is_available()
    if compute.device == "cuda" and not available:
        raise ConfigError(
            "compute.device is cuda, but this process sees no GPU; give each worker one "
            "(a cluster with GPU nodes), or take compute.device=auto"
        )
    if available and compute.device != "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device while it computes.

    From memory that is not pinned, as a stream's batches are, a copy to a GPU would wait for all
    that the GPU has been given to do.
    """
    if device.type == "cuda" and values.device.type == "cpu" and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def build(
    model: Model, method: Method, compute: Compute, seed: int, device: torch.device
) -> nn.Module:
    """Make the model with the same first weights on every rank, then spread it.

    ``ddp`` and ``fsdp2`` need an initialised process group; in a group of one they are what
    they are in a larger one, so nothing changes when a run grows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = DropPos(model, method)
    whole.to(device)
    whole.guide_dtype = guide_dtype(compute, device)
    blocks = transformer_blocks(whole)
    if compute.activation_checkpointing:
        for block in blocks:
            block.forward = _checkpointed(block.forward)
    if compute.compile:
        # Guide, student and decoders call the same code with other numbers of tokens: each gets a
        # graph of its own, for the few that there are, and not one for any number.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in blocks:
            block.compile(dynamic=False)
    if compute.strategy == "ddp":
        return _replicated(whole)
    if compute.strategy == "fsdp2":
        _shard(whole, blocks, compute, device)
    return whole


def _replicated(model: DropPos) -> DistributedDataParallel:
    """Have every rank hold all; buffers, a decoder's fixed positions, need no broadcast."""
    name = "forward_sync_buffers"
    if name not in signature(DistributedDataParallel).parameters:  # before torch 2.15
        name = "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, **options)


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep only a block's input for its backward pass.

    A function of this file: torch.compile steps over torch's own frames, so a block whose forward
    were ``partial(checkpoint, ...)`` would silently not be compiled.
    """

    def run(*tokens: Tensor, **asked: Tensor) -> Tensor:
        # No block draws a random number, so there is no generator's state to keep.
        output = checkpoint(  # pyright: ignore[reportCallIssue]
            forward,  # pyright: ignore[reportArgumentType]
            *tokens,
            use_reentrant=False,
            preserve_rng_state=False,
            **asked,
        )
        return cast(Tensor, output)

    return run


def transformer_blocks(model: DropPos) -> list[nn.Module]:
    """List the blocks of encoder and decoders: the units of compilation and sharding."""
    blocks = list(model.encoder.blocks)
    for decoder in (model.position_decoder, model.pixel_decoder):
        if decoder is not None:
            blocks += decoder.blocks
    return blocks


def _shard(model: DropPos, blocks: list[nn.Module], compute: Compute, device: torch.device) -> None:
    mesh = _mesh(compute, device)
    half = compute.precision == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32,  # small gradients survive the sum over ranks
    )
    for block in blocks if compute.shard_unit == "block" else []:
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=compute.reshard_after_forward
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, DropPos.encode_whole.__name__)


def _mesh(compute: Compute, device: torch.device) -> DeviceMesh:
    """Lay out the ranks: in one row of shards, or in rows that each hold a copy.

    Raises:
        ConfigError: If the ranks do not fill whole rows.
    """
    world, shards = dist.get_world_size(), compute.shard_ranks
    if shards is None:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    require(
        world % shards == 0,
        "compute.shard_ranks",
        shards,
        f"a divisor of the {world} ranks",
        f"take {gcd(world, shards)}, or another number of workers",
    )
    return init_device_mesh(
        device.type, (world // shards, shards), mesh_dim_names=("replicate", "shard")
    )


def precision(
    compute: Compute, device: torch.device, model: nn.Module
) -> AbstractContextManager[object]:
    """Open the arithmetic of a forward pass; a model that FSDP2 spreads casts by its own policy."""
    if compute.precision == "float32" or isinstance(model, FSDPModule):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def guide_dtype(compute: Compute, device: torch.device) -> torch.dtype | None:
    """Choose what the guide autocasts to; None where it computes as the student does."""
    wanted = compute.guide_precision == "bf16" and compute.precision == "float32"
    return torch.bfloat16 if wanted and has_bf16_units(device) else None


def has_bf16_units(device: torch.device) -> bool:
    """Tell whether bf16 products are faster than float32; emulated, they are many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, ARM
    return any(torch.cpu.get_capabilities().get(unit, False) for unit in units)


@contextmanager
def gradient_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Keep gradients on this rank until the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    local = isinstance(model, DistributedDataParallel) and not last
    with cast(DistributedDataParallel, model).no_sync() if local else nullcontext():
        yield


@torch.no_grad()
def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole weights into a model that may be spread; every rank calls this with the same.

    Args:
        model: Of :func:`build`.
        weights: By the names of :class:`DropPos`; those that are left out keep their values.
    """
    state = unwrap(model).state_dict()
    assert weights.keys() <= state.keys(), weights.keys() - state.keys()
    for name, whole in weights.items():
        held = state[name]
        whole = whole.to(held.device, held.dtype)
        if isinstance(held, DTensor):
            # Each rank cuts its own shard. torch's set_model_state_dict would scatter them from
            # rank 0, in the order of a set of names: another one in each process.
            whole = distribute_tensor(whole, held.device_mesh, held.placements, src_data_rank=None)
        held.copy_(whole)


def unwrap(model: nn.Module) -> DropPos:
    """Give the model inside a wrapper, for its attributes; call the wrapper for a forward."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, DropPos)
    return inner
