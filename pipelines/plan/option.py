"""An option: one recipe on machines of one type, with its memory, pace, hours and price."""

from dataclasses import dataclass, replace
from math import inf, isfinite

from droppos.footprint import Footprint, worker_footprint
from pipelines.memory import AHEAD
from pipelines.plan.fleet import Choice, Fleet, fleet
from pipelines.plan.life import Life, live
from pipelines.plan.losses import Losses
from pipelines.plan.pipeline import Flow, Service, simulate
from pipelines.plan.question import Question
from pipelines.plan.saving import Saving, saving
from pipelines.plan.step_time import LINE_SHARE, StepTime, step_time
from pipelines.plan.workload import Workload
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
REQUEST_USD = 0.4e-6
"""Of a GET, S3 Standard in us-east-1."""

_WORDS = {
    "storage": "object store",
    "decode": "decoding CPUs",
    "hand-over": "network to the workers",
    "cores": "cores for both",
    "checkpoints": "checkpoints",
}


@dataclass(frozen=True, slots=True)
class Bill:
    """Hours and money of a run, in the mean over simulated lives."""

    usd_per_hour: float
    life: Life
    interval_s: float
    """Seconds of training between two checkpoints, as the recipe has them."""
    best_interval_s: float
    """The same with the least expected time; infinite if nothing is ever lost."""
    best_factor: float
    """Expected time over that of the steps alone, at the best interval."""
    expected_factor: float
    """The same at the recipe's interval: by formula, where `life` is simulated."""
    requests_usd: float
    losses: Losses
    step_s: float
    """Of a step with what holds it up, between checkpoints."""

    @property
    def best_steps(self) -> float:
        """The best interval in steps, at least 1."""
        return (
            max(1.0, round(self.best_interval_s / self.step_s)) if self.losses.hard_per_s else inf
        )

    @property
    def hours(self) -> float:
        """Until the last step."""
        return self.life.seconds / 3600

    @property
    def usd(self) -> float:
        """All of it."""
        return self.hours * self.usd_per_hour + self.requests_usd


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
    per_machine = min(
        machine.gpus or machine.cpus // recipe.run.cpus_per_worker, recipe.run.workers
    )
    step = step_time(
        recipe, machine, max(1, per_machine), question.mfu, question.images_per_worker_s
    )
    alone = recipe.optim.global_batch / step.seconds
    place = fleet(recipe, machine, chosen, alone, work.decode_s)
    kept = saving(recipe, machine, place.per_machine)
    service = services(recipe, work, place, step, kept)
    flow = simulate(service, question.seed)
    bills = [_bill(recipe, work, place, service, flow, question, spot) for spot in (False, True)]
    assert bills[0] is not None
    memory = machine.gpu_memory_gb if machine.gpus else machine.memory_gb / place.per_machine
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
        pixels_bytes_s=flow.images_per_s * place.remote * work.crop_bytes,
        on_demand=bills[0],
        spot=bills[1],
    )


def services(recipe: Recipe, work: Workload, place: Fleet, step: StepTime, kept: Saving) -> Service:
    """Tell what each part of the pipeline takes."""
    network = LINE_SHARE * 1e9 / 8
    readers = place.machines * place.machine.network_gbit
    if place.decoders:
        readers = place.decoders * place.decoder.network_gbit + readers * (1 - place.remote)
    window_bytes = work.window * work.picture_bytes
    requests = work.window * work.requests_per_picture
    # A picture comes into the workers' machines as pixels, or encoded where they decode it.
    carried = place.remote * work.crop_bytes + (1 - place.remote) * work.picture_bytes
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


def losses(place: Fleet, service: Service, question: Question, spot: bool) -> Losses:
    """Count what strikes a fleet in a second: every machine with a worker, or that decodes."""
    workers, beside = place.machines, place.decoders
    rate = question.rate if spot else 0.0
    hard = (workers + beside) * question.hardware_rate + workers * rate * question.missed
    return Losses(
        hard_per_s=hard / 3600,
        noticed_per_s=workers * rate * (1 - question.missed) / 3600,
        blocked_s=service.blocked_s,
        write_s=service.write_s,
        restart_s=question.restart_s,
    )


def _bill(
    recipe: Recipe,
    work: Workload,
    place: Fleet,
    service: Service,
    flow: Flow,
    question: Question,
    spot: bool,
) -> Bill | None:
    price = place.usd_per_hour(spot)
    if price is None:
        return None
    # What checkpoints cost is counted in the run's life; the pace here is between them.
    pace = simulate(replace(service, checkpoint_steps=10**9), question.seed).images_per_s
    strikes = losses(place, service, question, spot)
    step_s = recipe.optim.global_batch / pace
    interval = recipe.run.checkpoint_every * step_s
    best = strikes.best_interval_s
    work_s = work.steps * step_s
    life = live(work_s, interval, strikes, question.seed)
    again = life.again_s / work_s if isfinite(life.again_s) else inf
    requests = work.images * work.requests_per_picture * (1 + again)
    return Bill(
        usd_per_hour=price,
        life=life,
        interval_s=interval,
        best_interval_s=best,
        best_factor=strikes.factor(min(best, work_s)),
        expected_factor=strikes.factor(min(interval, work_s)),
        requests_usd=requests * REQUEST_USD,
        losses=strikes,
        step_s=step_s,
    )
