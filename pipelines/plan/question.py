"""What a plan is asked: machines, prices and rates, and figures that a person has measured."""

from dataclasses import dataclass
from math import isfinite

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
        for name in ("pictures", "picture_kb", "decode_per_core", "images_per_worker_s"):
            value = getattr(self, name)
            _require(value is None or (value > 0 and isfinite(value)), name, value, "positive")
        _require(0 < self.mfu <= 1, "mfu", self.mfu, "above 0 and at most 1")
        _require(0 <= self.missed <= 1, "missed", self.missed, "from 0 to 1")
        for name in ("rate", "hardware_rate", "restart_s"):
            value = getattr(self, name)
            _require(value >= 0 and isfinite(value), name, value, "0 or more")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag} must be {expected}, got {value}; leave it out for the usual")
