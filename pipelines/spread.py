"""Who takes the features of a data set, and where they are kept, as `droppos evaluate` is told."""

from dataclasses import dataclass
from typing import Literal

from droppos.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Who takes the features, and where they are kept."""

    workers: int | None = None
    """Processes of Ray; none takes as many as the cluster of RAY_ADDRESS has GPUs (CPUs where it
    has none), and without RAY_ADDRESS does all in this process."""
    cpus_per_worker: int | None = None
    """CPUs of each, to read and decode with: what a GPU waits for. None takes each GPU's part of
    its machine's CPUs; without a GPU 1, and in this process all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs if there are any now; a cluster that scales them from zero shows none. What
    this process then measures takes the GPU that it sees, unless that is cpu."""
    cache: str | None = None
    """Folder or s3:// URI where features are kept, 4 bytes for each channel of each picture (3.9 GB
    for ImageNet with a ViT-B); none keeps nothing, so an interrupted evaluation starts anew."""

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be 1 or more, got {value}; leave it out")
