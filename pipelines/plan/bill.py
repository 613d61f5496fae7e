"""The bill of a run: hours and money, with checkpoints and lost machines, on demand and spot."""

from dataclasses import dataclass, replace
from math import inf, isfinite

from pipelines.plan.fleet import Fleet
from pipelines.plan.life import Life, live
from pipelines.plan.losses import Losses
from pipelines.plan.pipeline import Service, simulate
from pipelines.plan.question import Question
from pipelines.plan.workload import Workload
from pipelines.recipe import Recipe

REQUEST_USD = 0.4e-6
"""Of a GET, S3 Standard in us-east-1."""


@dataclass(frozen=True, slots=True)
class Bill:
    """Hours and money of a run, in the mean over simulated lives."""

    usd_per_hour: float
    life: Life
    interval_s: float
    """Seconds of training between two checkpoints, as the recipe has them."""
    best_interval_s: float
    """The same with the least expected time; infinite if nothing is ever lost."""
    best_steps: float
    """It in steps, at least 1; infinite if it is longer than the run."""
    best_factor: float
    """Expected time over that of the steps alone, at the best interval."""
    expected_factor: float
    """The same at the recipe's interval: by formula, where `life` is simulated."""
    lost: float
    """Share of the expected time that goes to lost machines, all but steps and checkpoints."""
    requests_usd: float
    losses: Losses

    @property
    def hours(self) -> float:
        """Until the last step."""
        return self.life.seconds / 3600

    @property
    def usd(self) -> float:
        """All of it."""
        return self.hours * self.usd_per_hour + self.requests_usd


def bills(
    recipe: Recipe, work: Workload, place: Fleet, service: Service, question: Question
) -> tuple[Bill, Bill | None]:
    """Price a run on demand, and on spot if its machines are offered so.

    Args:
        recipe: The run.
        work: What it has to do.
        place: Its machines.
        service: What each part of its pipeline takes.
        question: Rates and the seed of the simulations.
    """
    # What checkpoints cost is counted in the run's life; the pace here is between them.
    pace = simulate(replace(service, checkpoint_steps=10**9), question.seed).images_per_s
    step_s = recipe.optim.global_batch / pace

    def bill(spot: bool) -> Bill | None:
        price = place.usd_per_hour(spot)
        if price is None:
            return None
        strikes = losses(place, service, question, spot)
        return _bill(recipe, work, price, strikes, step_s, question.seed)

    on_demand = bill(spot=False)
    assert on_demand is not None
    return on_demand, bill(spot=True)


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
    price: float,
    strikes: Losses,
    step_s: float,
    seed: int,
) -> Bill:
    interval = recipe.run.checkpoint_every * step_s
    best = strikes.best_interval_s
    work_s = work.steps * step_s
    life = live(work_s, min(interval, work_s), strikes, seed)  # the last step is always saved
    again = life.again_s / work_s if isfinite(life.again_s) else inf
    requests = work.images * work.requests_per_picture * (1 + again)
    expected = strikes.factor(min(interval, work_s))
    unharmed = replace(strikes, hard_per_s=0.0, noticed_per_s=0.0)
    return Bill(
        usd_per_hour=price,
        life=life,
        interval_s=interval,
        best_interval_s=best,
        best_steps=max(1.0, round(best / step_s)) if best < work_s else inf,
        best_factor=strikes.factor(min(best, work_s)),
        expected_factor=expected,
        lost=1 - unharmed.factor(min(interval, work_s)) / expected,
        requests_usd=requests * REQUEST_USD,
        losses=strikes,
    )
