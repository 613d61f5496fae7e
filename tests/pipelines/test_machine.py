import time
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from pipelines.machine import Machine, device_name, over_nodes


def test_a_busy_machine_is_seen_to_be() -> None:
    machine = Machine()
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    values = machine.sample()
    assert 0 < values["cpu_percent"] <= 100
    assert 0 < values["memory_percent"] < 100
    assert values["memory_gb"] > 0.1
    assert values["network_in_mb_per_s"] >= 0
    assert "gpus" not in values or values["gpus"] > 0


def test_gpus_are_read_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU can be had here: NVIDIA's library is played."""

    def play(name: str, answer: Any) -> None:
        monkeypatch.setattr(pynvml, name, lambda *_: answer)

    play("nvmlInit", None)
    play("nvmlDeviceGetCount", 2)
    play("nvmlDeviceGetHandleByIndex", "handle")
    play("nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=80))
    play("nvmlDeviceGetMemoryInfo", SimpleNamespace(used=30e9))
    play("nvmlDeviceGetPowerUsage", 350_000)
    values = Machine().sample()
    assert values["gpus"] == 2
    assert values["gpu_percent"] == 80
    assert values["gpu_memory_gb"] == 30
    assert values["gpu_watts"] == 700


def node(**values: float) -> dict[str, float]:
    return {
        "cpu_percent": 50,
        "memory_percent": 10,
        "memory_gb": 1,
        "network_in_mb_per_s": 1,
        "network_out_mb_per_s": 2,
        **values,
    }


def test_nodes_are_summed_up_gpu_by_gpu() -> None:
    gpus = {"gpu_memory_gb": 5, "gpu_watts": 100}
    values = over_nodes(
        [
            node(memory_percent=30, gpus=1, gpu_percent=100, **gpus),
            node(cpu_percent=100, memory_gb=3, gpus=3, gpu_percent=20, **gpus),
            node(),
        ]
    )
    assert values["system/cpu_percent"] == pytest.approx(200 / 3)
    assert values["system/memory_percent"] == 30
    assert values["system/memory_gb"] == 3
    assert values["system/network_in_mb_per_s"] == 3
    assert values["system/network_out_mb_per_s"] == 6
    assert values["system/gpu_percent"] == 40
    assert values["system/gpu_watts"] == 200
    assert not any("gpu" in name for name in over_nodes([node()]))
    assert over_nodes([]) == {}


def test_a_device_has_a_name() -> None:
    assert device_name(torch.device("cpu")).strip()
