"""What a plan is asked: machines, prices and rates, and figures that a person has measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from droppos.errors import ConfigError

INTERRUPTIONS = 0.01
"""Spot interruptions of one machine in an hour, an assumption: one in four days. AWS tells them in
bands of a month (a fifth of the machines in one is 0.0003 an hour), but for all sizes of a type
together; large GPU machines in demand come and go within days."""
MISSED = 0.05
"""Share of interruptions whose notice is of no use, an assumption: too late, or with others."""
HARDWARE = 1.6e-4
"""Failures of one machine in an hour: Grattafiori et al. 2024 (Llama 3, section 3.3.4) report 419
unexpected interruptions in 54 days of 16,384 GPUs, 8 in a machine."""
RESTART_S = 300.0
"""Seconds from a lost machine to the next step, an assumption: 4 minutes for another to come, 45 s
for the workers to start (docs/faults.md) and their checkpoint."""
MFU = 0.3
"""Share of a GPU's peak that a training step reaches, an assumption, as `droppos doctor` has it; no
GPU has been measured yet. A run tells its own as compute/mfu."""
RANGES: Mapping[str, tuple[float, float]] = {
    "pictures": (1, 1e12),
    "picture_kb": (1e-2, 2e4),
    "decode_per_core": (1, 1e6),
    "images_per_worker_s": (1e-2, 1e6),
    "mfu": (1e-4, 1),
    "rate": (0, 60),
    "missed": (0, 1),
    "hardware_rate": (0, 60),
    "restart_s": (0, 86_400),
    "seed": (0, 2**63),
}
"""Least and most of each figure, far beyond what machines have: a slip in a unit, such as bytes for
kB, would otherwise make the simulation run for hours, or numbers overflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What to plan with."""

    machines: tuple[str, ...] = ()
    """Machine types to choose from. Those with GPUs train; of those without, the cheapest decode.
    None takes those of ./cluster.yaml, or a choice of common ones."""
    catalogue: str | None = None
    """A file of further machine types, with their prices (docs/plan.md)."""
    pictures: int | None = None
    """Pictures of the data set; none reads its manifest (data.path)."""
    picture_kb: float | None = None
    """kB of an encoded picture; none reads the manifest."""
    decode_per_core: float | None = None
    """Pictures that one CPU reads, decodes and hands on in a second, as `droppos doctor` measures
    it; none takes what was measured on one machine."""
    images_per_worker_s: float | None = None
    """Images that one worker trains on in a second, without waiting: measured; none takes a
    formula."""
    mfu: float = MFU
    """Share of a GPU's peak that the formula takes for a training step."""
    efa: bool = False
    """Whether the machines have EFA set up on all their network cards. cluster.yaml and the image
    don't: without it, a machine sends through one card."""
    rate: float = INTERRUPTIONS
    """Spot interruptions of one machine in an hour."""
    missed: float = MISSED
    """Share of these without a usable notice, from 0 to 1: they cost the steps since the last
    checkpoint."""
    hardware_rate: float = HARDWARE
    """Failures of one machine in an hour, on demand as well."""
    restart_s: float = RESTART_S
    """Seconds from a lost machine to the next step."""
    seed: int = 0
    """Of the simulations."""

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag} must be from {least:g} to {most:g}, got {value}; leave it out for the "
                    "usual"
                )
