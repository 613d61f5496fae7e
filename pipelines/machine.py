"""The machine under a worker: what it is, and how busy.

One worker of each node looks, from its pulse's thread; the driver sums up over nodes.
"""

import logging
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

SAMPLE_S = 10
"""Seconds between two looks, about."""

_log = logging.getLogger(__name__)


def device_name(device: torch.device) -> str:
    """Name what a worker computes on, as its maker does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    return platform.processor() or platform.machine()


class Machine:
    """Looks at this node."""

    def __init__(self) -> None:
        """Begin to count from now on."""
        psutil.cpu_percent()  # its first answer means nothing
        self._at = time.monotonic()
        self._network = _network_bytes()
        self._gpus = _gpu_handles()

    def sample(self) -> dict[str, float]:
        """Look: means since the last look where a rate is meant, the moment's value otherwise.

        Returns:
            CPU and memory in percent of the node, memory in GB, network in MB/s; with GPUs their
            number, mean use in percent, largest memory in GB, and power in watts.
        """
        now, network = time.monotonic(), _network_bytes()
        seconds = max(now - self._at, 1e-3)
        memory = psutil.virtual_memory()
        values = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": memory.percent,
            "memory_gb": (memory.total - memory.available) / 1e9,
            "network_in_mb_per_s": (network[0] - self._network[0]) / seconds / 1e6,
            "network_out_mb_per_s": (network[1] - self._network[1]) / seconds / 1e6,
        }
        self._at, self._network = now, network
        return values | _gpu_values(self._gpus)


def over_nodes(samples: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum up what the nodes that train tell.

    Returns:
        Metrics ``system/...``: means of shares (GPUs count one by one), the fullest node's memory,
        sums of network and power.
    """
    nodes = list(samples)
    if not nodes:
        return {}
    values = {
        "system/cpu_percent": _mean(nodes, "cpu_percent"),
        "system/memory_percent": max(node["memory_percent"] for node in nodes),
        "system/memory_gb": max(node["memory_gb"] for node in nodes),
        "system/network_in_mb_per_s": sum(node["network_in_mb_per_s"] for node in nodes),
        "system/network_out_mb_per_s": sum(node["network_out_mb_per_s"] for node in nodes),
    }
    if with_gpu := [node for node in nodes if node.get("gpus")]:
        gpus = sum(node["gpus"] for node in with_gpu)
        busy = sum(node["gpus"] * node["gpu_percent"] for node in with_gpu)
        values |= {
            "system/gpu_percent": busy / gpus,
            "system/gpu_memory_gb": max(node["gpu_memory_gb"] for node in with_gpu),
            "system/gpu_watts": sum(node["gpu_watts"] for node in with_gpu),
        }
    return values


def _mean(nodes: list[Mapping[str, float]], name: str) -> float:
    return sum(node[name] for node in nodes) / len(nodes)


def _network_bytes() -> tuple[int, int]:
    """Count bytes in and out of all interfaces but the one to itself."""
    cards = psutil.net_io_counters(pernic=True)
    real = [counters for name, counters in cards.items() if name != "lo"]
    return sum(each.bytes_recv for each in real), sum(each.bytes_sent for each in real)


def _gpu_handles() -> list[Any]:
    """Find all GPUs of the node, whoever uses them; none without NVIDIA's driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _gpu_values(handles: list[Any]) -> dict[str, float]:
    import pynvml

    nvml: Any = pynvml  # its annotations are of ctypes, and wrong
    if not handles:
        return {}
    watts = 0.0
    with suppress(nvml.NVMLError):  # a virtual GPU does not tell
        watts = sum(nvml.nvmlDeviceGetPowerUsage(handle) for handle in handles) / 1000
    try:
        use = [nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]
        memory = [nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles]
    except nvml.NVMLError as error:  # a GPU fell off the bus: training will tell
        _log.debug("no GPU figures: %s", error)
        return {}
    return {
        "gpus": len(handles),
        "gpu_percent": sum(use) / len(use),
        "gpu_memory_gb": max(memory) / 1e9,
        "gpu_watts": watts,
    }
