"""Zones: what a run would pay for traffic if a machine stood in another zone than the rest."""

from dataclasses import dataclass

from pipelines.plan.fleet import Fleet
from pipelines.plan.rings import Rings
from pipelines.plan.workload import Workload

GB_USD = 0.01
"""Of a GB from one zone of a region to another, by AWS's list: whoever sends it pays this, and
whoever receives it pays as much again."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """USD of a whole run, by formula; steps done again are left out."""

    worker_usd: float
    """If one machine of the workers stands in another zone: its rings and its crops."""
    decoder_usd: float
    """If one of those that only decode does: its crops."""


def crossing(work: Workload, place: Fleet, sent: Rings) -> Crossing:
    """Price both.

    Args:
        work: What the run has to do.
        place: Its machines.
        sent: What its workers send one another in a step.
    """
    crops = work.images * work.crop_bytes
    made = (1 - place.remote) / place.machines  # share of the crops that one machine makes itself
    into, out_of = (1 - made) / place.machines, made * (1 - 1 / place.machines)
    own = work.steps * sent.crossing_bytes + crops * (into + out_of)
    decoded = crops * place.remote / place.decoders if place.decoders else 0.0
    return Crossing(_usd(own), _usd(decoded))


def _usd(size: float) -> float:
    return 2 * GB_USD * size / 1e9
