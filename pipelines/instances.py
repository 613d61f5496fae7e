"""Machine types: what each has, and what it costs an hour.

The figures are data, in instances.yaml beside this file; its head says where they come from. On
demand they are list prices of one day and one region, on spot typical values of a price that moves.
A person's own file of the same form adds to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import yaml

from droppos.errors import ConfigError

_SHIPPED = Path(__file__).with_name("instances.yaml")
_GPU_FIELDS = {"memory_gb", "bf16_tflops", "float32_tflops", "link_gbyte_s"}
_NEEDED = {"cpus", "memory_gb", "network_gbit", "on_demand"}
_OPTIONAL = {"gpu", "gpus", "efa_gbit", "spot"}


@dataclass(frozen=True, slots=True)
class Instance:
    """One type of machine."""

    name: str
    cpus: int
    """As Linux counts them: hyper-threads."""
    memory_gb: float
    gpus: int
    gpu: str | None
    """Kind of GPU; None without one."""
    gpu_memory_gb: float
    """Of one GPU; 0 without."""
    bf16_tflops: float | None
    """Dense peak of one GPU."""
    float32_tflops: float | None
    """The same in float32, without TF32."""
    link_gbyte_s: float
    """GB/s that a GPU sends to another in the machine; 0 without."""
    network_gbit: float
    """Gbit/s to other machines and to storage, sustained, of one network card."""
    efa_gbit: float | None
    """Gbit/s between GPUs of different machines with EFA on all cards; None where that is no more
    than without."""
    on_demand: float
    """USD an hour, by the list of the day `priced`."""
    spot: float | None
    """USD an hour, typical; None where it is not offered."""
    priced: date

    def between_gbit(self, efa: bool) -> float:
        """Gbit/s between workers of different machines, with EFA or without."""
        return (efa and self.efa_gbit) or self.network_gbit


@cache
def catalogue(file: str | Path | None = None) -> Mapping[str, Instance]:
    """List the machine types that are known, by name.

    Args:
        file: YAML of further ones, in the form of instances.yaml; of two with one name its counts.

    Raises:
        ConfigError: If the file cannot be read, or something in it is missing, unknown or no
            number.
    """
    shipped = _read(_SHIPPED, {})
    if file is None:
        return shipped
    gpus = _load(_SHIPPED)["gpus"]
    return {**shipped, **_read(Path(file), gpus)}


def find(name: str, file: str | Path | None = None) -> Instance:
    """Look one machine type up.

    Raises:
        ConfigError: If it is not known; the nearest names are told.
    """
    known = catalogue(file)
    if name in known:
        return known[name]
    near = get_close_matches(name, known, 3, 0.5) or list(known)[:3]
    raise ConfigError(
        f"the machine type {name!r} is not known, only such as {', '.join(near)}; correct it, or "
        "describe it in a file of your own (--catalogue FILE, docs/plan.md)"
    )


def _read(path: Path, gpus: Mapping[str, Any]) -> dict[str, Instance]:
    content = _load(path)
    unknown = content.keys() - {"priced", "spot_share", "gpus", "machines"}
    _require(not unknown, path, f"has unknown parts: {', '.join(sorted(map(str, unknown)))}")
    priced = content.get("priced")
    if not isinstance(priced, date):
        _refuse(path, "needs `priced`, the day of its prices: 2026-01-31")
    kinds = {**gpus, **_mapping(path, content, "gpus")}
    for kind, has in kinds.items():
        _fields(path, f"gpus.{kind}", has, _GPU_FIELDS, set())
    machines = _mapping(path, content, "machines")
    share = content.get("spot_share")
    _require(share is None or _positive(share), path, f"spot_share is {share!r}, not positive")
    return {
        name: _instance(path, str(name), has, kinds, priced, share)
        for name, has in machines.items()
    }


def _instance(
    path: Path, name: str, has: Any, kinds: Mapping[str, Any], priced: date, share: float | None
) -> Instance:
    where = f"machines.{name}"
    _fields(path, where, has, _NEEDED, _OPTIONAL)
    gpu, gpus = has.get("gpu"), has.get("gpus", 0)
    _require((gpu is None) == (gpus == 0), path, f"{where} needs both gpu and gpus, or neither")
    _require(
        gpu is None or (isinstance(gpu, str) and gpu in kinds),
        path,
        f"{where} has a GPU {gpu!r} that `gpus` does not describe",
    )
    for field in ("cpus", "gpus"):
        count = has.get(field, 0)
        _require(isinstance(count, int), path, f"{where}.{field} is {count!r}, no whole number")
    kind = kinds[gpu] if gpu is not None else {}
    spot = has.get("spot", None if share is None else round(share * has["on_demand"], 4))
    return Instance(
        name=name,
        cpus=has["cpus"],
        memory_gb=has["memory_gb"],
        gpus=gpus,
        gpu=gpu,
        gpu_memory_gb=kind.get("memory_gb", 0),
        bf16_tflops=kind.get("bf16_tflops"),
        float32_tflops=kind.get("float32_tflops"),
        link_gbyte_s=kind.get("link_gbyte_s", 0),
        network_gbit=has["network_gbit"],
        efa_gbit=has.get("efa_gbit"),
        on_demand=has["on_demand"],
        spot=spot,
        priced=priced,
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the catalogue {path} cannot be read: {error}") from error
    _require(isinstance(content, dict), path, "holds no `priced:` and `machines:`")
    return content


def _mapping(path: Path, content: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    found = content.get(part, {} if part == "gpus" else None)
    _require(isinstance(found, dict), path, f"needs `{part}:` with a line for each, by its name")
    return found  # pyright: ignore[reportReturnType]


def _fields(path: Path, where: str, has: Any, needed: set[str], optional: set[str]) -> None:
    """Refuse what is missing, unknown, or no positive number."""
    _require(isinstance(has, dict), path, f"{where} needs fields: {', '.join(sorted(needed))}")
    missing, unknown = needed - has.keys(), has.keys() - needed - optional
    _require(not missing, path, f"{where} lacks {', '.join(sorted(missing))}")
    _require(not unknown, path, f"{where} has unknown fields: {', '.join(sorted(unknown))}")
    for field, value in has.items():
        if field != "gpu":
            _require(_positive(value), path, f"{where}.{field} is {value!r}, not a positive number")


def _positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and isfinite(value) and value > 0


def _require(holds: bool, path: Path, problem: str) -> None:
    if not holds:
        _refuse(path, problem)


def _refuse(path: Path, problem: str) -> NoReturn:
    raise ConfigError(f"the catalogue {path} {problem}; docs/plan.md shows its form")
