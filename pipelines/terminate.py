"""SIGTERM to a training worker: a wish to leave, at the next step and after a checkpoint.

Whoever shuts a machine down (a pod's eviction, an operator, a batch system) sends it, and kills
what is still there some time later. Python hears signals on a process's main thread alone, where
Ray Train does not run the training; its backend does run there when a group starts.
"""

import logging
import signal

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

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


class _ListeningBackend(_TorchBackend):
    def on_training_start(self, worker_group, backend_config):
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_listen)


class ListeningTorch(TorchConfig):
    """Ray Train's torch, whose workers take SIGTERM for a wish to leave."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts the workers."""
        return _ListeningBackend
