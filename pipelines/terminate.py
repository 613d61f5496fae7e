"""How a group of workers starts: its process group, and an ear for SIGTERM.

SIGTERM to a training worker is a wish to leave, at the next step and after a checkpoint. Whoever
shuts a machine down (a pod's eviction, an operator, a batch system) sends it, and kills what is
still there some time later. Python hears signals on a process's main thread alone, where Ray Train
does not run the training; its backend does run there when a group starts.

Ray's own torch backend imports torch where it stands, which is Train's controller: six seconds in
which no worker can start. This one has Ray's run in the workers.
"""

import logging
import os
import signal
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

INIT_S = 1800
"""Seconds that workers wait for each other, at the start and in each collective."""

PART_S = 30
"""Seconds that workers have to leave their process group."""

_asked = False

_log = logging.getLogger(__name__)


def asked_to_terminate() -> bool:
    """Tell whether this process was sent SIGTERM."""
    return _asked


def _listen() -> None:
    """Run on a worker's main thread."""

    def on_signal(number: int, frame: object) -> None:
        global _asked
        _asked = True
        _log.warning("SIGTERM: leaving after a checkpoint")

    signal.signal(signal.SIGTERM, on_signal)


def _join(address: str, port: int, backend: str, rank: int, world_size: int) -> None:
    """Run on a worker: as Ray's own backend has it."""
    from ray.train.torch.config import (
        _set_torch_distributed_env_vars,
        _setup_torch_process_group,
    )

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(backend, rank, world_size, "env://", INIT_S)


def _part(several: bool) -> None:
    """Run on a worker, likewise."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=several)


class _ListeningBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        assert isinstance(backend_config, ListeningTorch) and backend_config.backend is not None
        backend, size = backend_config.backend, len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, address, port, backend, rank, size)
                for rank in range(size)
            ]
        )

    def on_training_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        worker_group.execute(_listen)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        parted = worker_group.execute_async(_part, len(worker_group) > 1)
        ray.wait(parted, num_returns=len(parted), timeout=PART_S)


@dataclass
class ListeningTorch(BackendConfig):
    """Ray Train's torch, whose workers take SIGTERM for a wish to leave."""

    backend: str | None = None
    """Of torch.distributed; TorchTrainer sets it, by the device."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What starts the workers."""
        return _ListeningBackend

    @property
    def framework(self) -> Any:
        """What Ray calls it in its own records."""
        return TrainingFramework.TORCH

    @property
    def train_func_context(self) -> Any:
        """What the loop runs in: its own GPU is torch's default there."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager
