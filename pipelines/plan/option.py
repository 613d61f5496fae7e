"""An option: one recipe on machines of one type, with its memory, pace, hours and price."""

from dataclasses import dataclass

from droppos.footprint import Footprint, worker_footprint
from pipelines.memory import AHEAD
from pipelines.plan.bill import Bill, bills
from pipelines.plan.fleet import Choice, Fleet, fleet, slots
from pipelines.plan.pipeline import Flow, Service, simulate
from pipelines.plan.question import Question
from pipelines.plan.rings import LINE_SHARE, rings
from pipelines.plan.saving import Saving, saving
from pipelines.plan.step_time import StepTime, step_time
from pipelines.plan.workload import Workload
from pipelines.plan.zones import Crossing, crossing
from pipelines.recipe import Recipe
from pipelines.windows import READERS

RESERVED_GB = 2.0
"""Memory of a GPU that is not for tensors: context, libraries, workspaces, NCCL; an assumption."""
FRAGMENTS = 0.08
"""Share of the rest that the allocator cannot use, an assumption."""
REQUESTS_PER_S = 5500
"""GET and HEAD requests a second that S3 promises for a prefix, such as a data set's folder."""
CONNECTION_BYTES_S = 85e6
"""What one request brings in a second: AWS's guidelines for S3 say 85 to 90 MB/s."""
FIRST_BYTE_S = 0.06
"""Until a request's first byte, an assumption."""

_WORDS = {
    "storage": "object store",
    "decode": "decoding CPUs",
    "hand-over": "network to the workers",
    "cores": "cores for both",
    "checkpoints": "checkpoints",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What a recipe does on machines of one type."""

    recipe: Recipe
    """With the workers and micro-batches it is planned for."""
    fleet: Fleet
    memory: Footprint
    memory_bytes: float
    """That a worker may use."""
    step: StepTime
    saving: Saving
    service: Service
    flow: Flow
    storage_bytes_s: float
    """Drawn from storage at that pace."""
    requests_s: float
    pixels_bytes_s: float
    """Decoded crops that go from one machine to another."""
    on_demand: Bill
    spot: Bill | None
    crossing: Crossing

    @property
    def fits(self) -> bool:
        """Whether a worker's memory is enough."""
        return self.memory.peak <= self.memory_bytes

    @property
    def bound(self) -> str:
        """Name the part that is the slowest."""
        return self.bounds[0][0]

    @property
    def bounds(self) -> list[tuple[str, float]]:
        """Pictures per second that each part could do, the slowest first."""
        found = sorted(self.service.bounds.items(), key=lambda part: part[1])
        return [(self._words(part), per_s) for part, per_s in found]

    @property
    def decode_cpus_needed(self) -> float:
        """CPUs that decode all the time at that pace."""
        return self.flow.images_per_s * self.service.decode_s / self.service.window

    def _words(self, part: str) -> str:
        if part != "train":
            return _WORDS[part]
        return self.step.bound if self.fleet.machine.gpus else "CPU step"


def option(recipe: Recipe, work: Workload, chosen: Choice, question: Question, name: str) -> Option:
    """Plan a recipe for one machine type.

    Args:
        recipe: The run, with its workers.
        work: What it has to do.
        chosen: Machine types.
        question: Rates, prices, measured figures.
        name: Of the type for the workers.

    Raises:
        ConfigError: If a worker has no room on such a machine.
    """
    machine = next(each for each in chosen.training if each.name == name)
    per_machine = slots(recipe, machine)
    sent = rings(recipe, machine, per_machine, question.efa)
    step = step_time(recipe, machine, question, sent.seconds)
    alone = recipe.optim.global_batch / step.seconds
    place = fleet(recipe, machine, chosen, alone, work.decode_s)
    kept = saving(recipe, machine, per_machine)
    service = services(recipe, work, place, step, kept)
    flow = simulate(service, question.seed)
    on_demand, spot = bills(recipe, work, place, service, question)
    memory = machine.gpu_memory_gb if machine.gpus else machine.memory_gb / per_machine
    return Option(
        recipe=recipe,
        fleet=place,
        memory=worker_footprint(
            recipe.model,
            recipe.method,
            recipe.compute,
            images=recipe.worker_batch,
            workers=recipe.run.workers,
            accumulate=recipe.optim.accumulate,
        ),
        memory_bytes=max(0.0, memory - RESERVED_GB) * 1e9 * (1 - FRAGMENTS),
        step=step,
        saving=kept,
        service=service,
        flow=flow,
        storage_bytes_s=flow.images_per_s * work.picture_bytes,
        requests_s=flow.images_per_s * work.requests_per_picture,
        pixels_bytes_s=flow.images_per_s * place.carried * work.crop_bytes,
        on_demand=on_demand,
        spot=spot,
        crossing=crossing(work, place, sent),
    )


def services(recipe: Recipe, work: Workload, place: Fleet, step: StepTime, kept: Saving) -> Service:
    """Tell what each part of the pipeline takes."""
    network = LINE_SHARE * 1e9 / 8
    # Tasks are spread evenly over the CPUs that decode, so whichever machines are slower count.
    readers = min(
        total / share
        for total, share in (
            (place.machines * place.machine.network_gbit, 1 - place.remote),
            (place.decoders * place.decoder.network_gbit, place.remote),
        )
        if share > 0
    )
    window_bytes = work.window * work.picture_bytes
    requests = work.window * work.requests_per_picture
    # What comes into the workers' machines: crops from others, and encoded what they decode.
    carried = place.carried * work.crop_bytes + (1 - place.remote) * work.picture_bytes
    inbound = place.machines * place.machine.network_gbit * network
    batch = recipe.optim.global_batch
    cores = 0.0
    if not place.machine.gpus and not place.decoders:
        trained = place.workers * recipe.run.cpus_per_worker * step.compute_s
        cores = (trained + batch * work.decode_s) / (place.machines * place.machine.cpus)
    return Service(
        batch=batch,
        window=work.window,
        tasks=place.decode_cpus,
        room=place.decode_cpus * work.window + AHEAD * place.workers * recipe.worker_batch,
        storage_s=max(window_bytes / (readers * network), requests / REQUESTS_PER_S),
        latency_s=FIRST_BYTE_S + window_bytes / (READERS * CONNECTION_BYTES_S),
        decode_s=work.window * work.decode_s,
        hand_s=batch * carried / inbound,
        step_s=step.seconds,
        cores_s=cores,
        checkpoint_steps=recipe.run.checkpoint_every,
        blocked_s=kept.blocked_s,
        write_s=kept.write_s,
    )
