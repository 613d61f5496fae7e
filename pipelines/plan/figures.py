"""Each figure of a plan with its unit and where it is from: model, measurement or list price.

The report and `--json` show the same list.
"""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from droppos.footprint import parameters
from pipelines.plan.bill import Bill
from pipelines.plan.job import Plan
from pipelines.plan.losses import daly, young
from pipelines.plan.option import Option
from pipelines.plan.question import INTERRUPTIONS, MFU, Question
from pipelines.plan.scaling import Scale
from pipelines.plan.zones import GB_USD

FORMULA, SIMULATED, ASSUMED, GIVEN = "by formula", "simulated", "assumed", "given"
RECIPE = "of the recipe"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number."""

    name: str
    value: float
    unit: str
    how: str
    """Formula, simulation, measurement (where), list price of a day, given, recipe, or assumed."""


def run_figures(plan: Plan) -> list[Figure]:
    """Tell what the run is, whatever machines it has."""
    work, recipe = plan.work, plan.recipe
    return [
        Figure("pictures", work.pictures, "", work.source),
        Figure("  of", work.picture_bytes / 1e3, "kB", work.source),
        Figure("weights", parameters(recipe.model, recipe.method) / 1e6, "million", FORMULA),
        Figure("steps", work.steps, f"of {recipe.optim.global_batch:,} images", FORMULA),
        Figure("images in all", work.images / 1e6, "million", FORMULA),
        Figure("workers", recipe.run.workers, "", RECIPE),
        Figure("  images of a micro-batch", recipe.worker_batch, "", RECIPE),
    ]


def memory_figures(option: Option) -> list[Figure]:
    """Tell a worker's memory at the highest point of a step."""
    memory = option.memory
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "gradients": memory.gradients,
        "gathered, buckets, copies": memory.gathered,
        "images": memory.images,
        "activations": memory.activations,
        "within a block": memory.working,
        "guide, before activations": memory.guide,
        "at the highest point": memory.peak,
    }
    figures = [Figure(name, size / 1e9, "GB", FORMULA) for name, size in parts.items()]
    usable = Figure("that can be used", option.memory_bytes / 1e9, "GB", "data sheet, less a share")
    return [*figures, usable]


def pace_figures(option: Option, question: Question, decode_source: str) -> list[Figure]:
    """Tell the pace, and what it asks of CPUs, storage and network."""
    step, flow, place = option.step, option.flow, option.fleet
    given = question.images_per_worker_s is not None
    share = f"{question.mfu:.0%} of the peak {ASSUMED if question.mfu == MFU else GIVEN}"
    arithmetic = GIVEN if given else f"{FORMULA}, {share}"
    if not place.machine.gpus and not given:
        arithmetic = f"{FORMULA}, a CPU's pace as in docs/step.md"
    line = (
        "EFA, given" if question.efa and place.machine.efa_gbit else "data sheet, one network card"
    )
    return [
        Figure("images/s", flow.images_per_s, "", SIMULATED),
        Figure("  workers wait", 100 * flow.waiting, "% of the time", SIMULATED),
        *(
            Figure(f"  {name} could do", per_s, "images/s", FORMULA)
            for name, per_s in option.bounds
        ),
        Figure("step: arithmetic", 1e3 * step.arithmetic_s, "ms", arithmetic),
        Figure("between machines", place.machine.between_gbit(question.efa), "Gbit/s", line),
        Figure("step: communication", 1e3 * step.communication_s, "ms", FORMULA),
        Figure("  of it not hidden", 1e3 * step.exposed_s, "ms", FORMULA),
        Figure("CPUs that decode: needed", option.decode_cpus_needed, "", decode_source),
        Figure("CPUs that decode: there", place.decode_cpus, "", FORMULA),
        Figure("from the object store", option.storage_bytes_s / 1e9, "GB/s", FORMULA),
        Figure("requests to it", option.requests_s, "a second", FORMULA),
        Figure("pixels between machines", option.pixels_bytes_s / 1e9, "GB/s", FORMULA),
    ]


def saving_figures(option: Option) -> list[Figure]:
    """Tell size, time and interval of checkpoints, for the cheaper way to pay."""
    bill = cheaper(option)
    hard = bill.losses.hard_per_s
    figures = [
        Figure("size", option.saving.bytes / 1e9, "GB", FORMULA),
        Figure("training waits", option.saving.blocked_s, "s", FORMULA),
        Figure("complete after", option.saving.write_s, "s", f"{FORMULA}, upload assumed"),
        Figure("every", bill.interval_s / 60, "minutes", "run.checkpoint_every"),
    ]
    if hard:
        saving_s = max(option.saving.blocked_s, 1e-6)
        figures += [
            Figure("best: exactly", bill.best_interval_s / 60, "minutes", FORMULA),
            Figure("best: in steps", bill.best_steps, "", FORMULA),
            Figure("best: Young", young(hard, saving_s) / 60, "minutes", FORMULA),
            Figure("best: Daly", daly(hard, saving_s) / 60, "minutes", FORMULA),
        ]
    return [
        *figures,
        Figure("lost to saving and losses", _lost(bill.expected_factor), "% of the time", FORMULA),
        Figure("  at the best interval", _lost(bill.best_factor), "% of the time", FORMULA),
    ]


def _lost(factor: float) -> float:
    """Percent of the time that is no step's."""
    return 100 * (1 - 1 / factor)


def money_figures(option: Option, question: Question) -> list[Figure]:
    """Tell hours and money, on demand and on spot."""
    place = option.fleet
    listed = f"list price of {place.machine.priced}"
    figures = _bill_figures("on demand", option.on_demand, listed)
    if option.spot is not None:
        figures += _bill_figures(
            "on spot", option.spot, f"typical spot price, lists of {place.machine.priced}"
        )
        usual = question.rate == INTERRUPTIONS
        how = ASSUMED if usual else GIVEN
        figures.append(Figure("interruptions of a machine", question.rate, "an hour", how))
    per_gb = f"{FORMULA}, {GB_USD} USD per GB each way"
    elsewhere = {
        "machine in another zone": option.crossing.worker_usd,
        "  one that decodes": option.crossing.decoder_usd,
    }
    return figures + [
        Figure(name, usd, "USD more", per_gb) for name, usd in elsewhere.items() if usd
    ]


def _bill_figures(how: str, bill: Bill, source: str) -> list[Figure]:
    return [
        Figure(f"{how}: an hour", bill.usd_per_hour, "USD", source),
        Figure("  hours", bill.hours, "", SIMULATED),
        Figure("  machines lost, with notice", bill.life.noticed, "", SIMULATED),
        Figure("  machines lost, without", bill.life.hard, "", SIMULATED),
        Figure("  requests to storage", bill.requests_usd, "USD", "S3's list price"),
        Figure("  in all", bill.usd, "USD", SIMULATED),
    ]


def cheaper(option: Option) -> Bill:
    """Choose the way to pay that costs less."""
    if option.spot is not None and option.spot.usd < option.on_demand.usd:
        return option.spot
    return option.on_demand


def as_json(plan: Plan) -> dict[str, Any]:
    """Write the whole plan for scripts: JSON's types only, None where a number is infinite."""
    best = plan.best

    def listed(figures: list[Figure]) -> list[dict[str, Any]]:
        return [plain(asdict(figure)) | {"name": figure.name.strip()} for figure in figures]

    return {
        "recipe": plan.recipe.run.name,
        "machines_from": plan.machines_source,
        "run": listed(run_figures(plan)),
        "options": [_option_json(each) for each in plan.options],
        "best": {
            "machine": best.fleet.machine.name,
            "memory": listed(memory_figures(best)),
            "pace": listed(pace_figures(best, plan.question, plan.work.decode_source)),
            "checkpoints": listed(saving_figures(best)),
            "money": listed(money_figures(best, plan.question)),
        },
        "scaling": [_scale_json(each) for each in plan.scaling],
    }


def _option_json(each: Option) -> dict[str, Any]:
    return plain(
        {
            "machine": each.fleet.machine.name,
            "machines": each.fleet.machines,
            "decoders": each.fleet.decoders,
            "decoder": each.fleet.decoder.name,
            "fits": each.fits,
            "memory_gb": each.memory.peak / 1e9,
            "images_per_s": each.flow.images_per_s,
            "bound": each.bound,
            "on_demand_hours": each.on_demand.hours,
            "on_demand_usd": each.on_demand.usd,
            "spot_hours": each.spot.hours if each.spot else None,
            "spot_usd": each.spot.usd if each.spot else None,
        }
    )


def _scale_json(each: Scale) -> dict[str, Any]:
    found = {"gpus": each.gpus, "used": each.used, "bound": each.bound}
    if each.option is None:
        return found
    return _option_json(each.option) | {"lost": each.lost} | found


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Replace numbers that JSON does not know."""
    return {
        name: None if isinstance(value, float) and not isfinite(value) else value
        for name, value in values.items()
    }
