"""What a checkpoint keeps of a rank, and how it comes back at any size and by any strategy."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from droppos.step import TrainState
from pipelines import checkpoints, stored_state


def kept_state(state: TrainState) -> dict[str, Any]:
    """Give this rank's part of what :func:`stored_state.save` is to write; all ranks call this."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    return {"model": model, "optimizer": optimizer, **random_state(state.device)}


def restore(state: TrainState, saved: checkpoints.Saved | None) -> None:
    """Put a checkpoint's weights, moments, step and random state into this rank's, at any size.

    Raises:
        DamagedError: On all ranks, if a file is not what was written.
    """
    if saved is None:
        return
    model, optimizer = get_state_dict(state.model, state.optimizer)
    kept: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if dist.get_rank() < saved.record.get("random_states", 0):
        there = saved.record.get("random_devices", ["cpu"])
        kept |= {
            name: value
            for name, value in random_state(state.device).items()
            if name.split("-")[1] in there
        }
    stored_state.load(saved, kept)
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    for name, value in kept.items():
        if name.startswith("random-cpu"):
            torch.set_rng_state(value["state"])
        elif name.startswith("random-cuda"):
            torch.cuda.set_rng_state(value["state"], state.device)
    state.step = saved.step
    # The optimizer's settings are the recipe's, not the checkpoint's: --allow-changes may differ.
    decays = (state.optim.weight_decay, 0.0)
    for group, decay in zip(state.optimizer.param_groups, decays, strict=True):
        group |= {"weight_decay": decay, "betas": state.optim.betas}


def random_state(device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Take this rank's generators. Nothing draws from them today: masks and crops have their own.

    Returns:
        Under a key for the rank and the kind of device: each rank keeps and finds only its own, and
        a run may move between CPUs and GPUs.
    """
    rank = f"{dist.get_rank():05d}"
    state = {f"random-cpu-{rank}": {"state": torch.get_rng_state()}}
    if device.type == "cuda":
        state[f"random-cuda-{rank}"] = {"state": torch.cuda.get_rng_state(device)}
    return state
