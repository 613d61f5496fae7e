"""Compare what the plan's simulation says of a pipeline with what that pipeline then does.

    make bench-plan                                    # about a quarter of an hour on two cores
    python -m tests.benchmarks.plan --rounds 1 --only decode-1,train-1

Real training runs on this machine: with one worker and with two, of a model so small that decoding
holds it up, and of one so large that its steps do. Of each, the step, a checkpoint and decoding are
measured alone first (`tests.benchmarks.plan_parts`), and put into the simulation that
`droppos plan` runs (`pipelines.plan.pipeline`). Then the run is made, and its images per second are
taken from the times that its workers tell. Rounds take all of it again, in turn. The pictures are
like ImageNet's (`tests.benchmarks.tiles`).

It needs a machine that nobody else uses: `others` tells the cores that other programs took, while
decoding was measured or in the run, whichever was more. Rounds in which that was little count alone
where there are some. The last line is for scripts: the largest and the mean distance of
predicted / measured from 1, over the cases' medians, and whether all of these were quiet.
"""

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any, NamedTuple

import ray
from rich.console import Console
from rich.table import Table

from droppos.config import Compute, Method, Model, Optim
from pipelines.memory import AHEAD
from pipelines.order import window_rows
from pipelines.plan.pipeline import Service, simulate
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.recipe import Data, Recipe, Run, Tracking
from pipelines.stream_gauge import cpu_seconds
from tests.benchmarks.plan_parts import Decoding, Training, measure_decoding, measure_training
from tests.benchmarks.tiles import write_tiles

PICTURES = 1024
CHECKPOINT_STEPS = 40
WARM_UP = 1 / 3
"""Share of a run's steps that are not counted."""
QUIET = 0.15
"""Cores that others may use in a round that counts as quiet."""

SMALL = Model(
    size="tiny",
    image_size=(112, 112),
    width=48,
    depth=1,
    heads=4,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=4,
)
LARGE = replace(SMALL, width=192, depth=6, heads=3, decoder_width=64)


class Case(NamedTuple):
    """A recipe of its own kind."""

    model: Model
    workers: int
    steps: int


CASES = {
    "decode-1": Case(SMALL, 1, 300),
    "decode-2": Case(SMALL, 2, 300),
    "train-1": Case(LARGE, 1, 120),
    "train-2": Case(LARGE, 2, 120),
}


class Found(NamedTuple):
    """One round of one case, in images per second."""

    predicted: float
    measured: float
    bound: str
    others: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def words(self) -> str:
        return (
            f"predicted {self.predicted:.0f} images/s, bound by {self.bound}; measured "
            f"{self.measured:.0f}, ratio {self.ratio:.2f}; others used {self.others:.1f} cores"
        )


def main() -> None:
    """Measure, and print a table and the line for scripts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=12, help="of each part's measurement")
    parser.add_argument("--photographs", type=Path, help="folder of large JPEGs to cut tiles from")
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    console = Console()
    found: dict[str, list[Found]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as name:
        folder = Path(name)
        print(write_tiles(folder / "tiles", PICTURES, options.photographs), flush=True)
        prepare(str(folder / "tiles"), str(folder / "data"), group_rows=32)
        for number in range(options.rounds):
            for case in options.only:
                recipe = recipe_of(CASES[case], folder, f"{case}-{number}")
                each = round_of(recipe, CASES[case].steps, options.seconds)
                found[case].append(each)
                print(f"round {number + 1} {case}: {each.words}", flush=True)
    show(console, found)


def recipe_of(case: Case, folder: Path, name: str) -> Recipe:
    """Make a run of one window after another, decoded by one task."""
    batch = 32
    return Recipe(
        model=case.model,
        method=Method(mask_ratio=0.5, attentive=case.model is LARGE),
        optim=Optim(epochs=-(-case.steps * batch // PICTURES), global_batch=batch, warmup_epochs=0),
        compute=Compute(strategy="ddp", precision="float32", device="cpu"),
        data=Data(path=str(folder / "data"), window=128, decode_cpus=1),
        run=Run(
            name=name,
            storage=str(folder / "runs"),
            workers=case.workers,
            log_every=5,
            checkpoint_every=CHECKPOINT_STEPS,
            keep_checkpoints=1,
        ),
        tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
    )


def round_of(recipe: Recipe, steps: int, seconds: float) -> Found:
    """Measure the parts, predict, and run."""
    training = measure_training(recipe, seconds)
    decoding = measure_decoding(recipe, seconds)
    service = service_of(recipe, training, decoding)
    bounds = service.bounds
    predicted = simulate(service, seed=0, steps=steps).images_per_s
    measured, others = run(recipe)
    bound = min(bounds, key=lambda part: bounds[part])
    return Found(predicted, measured, bound, max(others, decoding.others))


def service_of(recipe: Recipe, training: Training, decoding: Decoding) -> Service:
    """Put measured seconds into the pipeline's queues."""
    batch, workers = recipe.optim.global_batch, recipe.run.workers
    window = window_rows(recipe.data.window, batch)
    cores = os.cpu_count() or 1
    return Service(
        batch=batch,
        window=window,
        tasks=1,
        room=window + AHEAD * workers * recipe.worker_batch,
        storage_s=0.0,  # a folder in the page cache: what it costs is in the stream's CPU
        latency_s=0.0,
        decode_s=window * decoding.picture_s,
        hand_s=0.0,
        step_s=training.step_s,
        cores_s=(workers * training.cpu_s + batch * decoding.cpu_s) / cores,
        checkpoint_steps=recipe.run.checkpoint_every,
        blocked_s=training.blocked_s,
        write_s=training.write_s,
    )


def run(recipe: Recipe) -> tuple[float, float]:
    """Train for real.

    Returns:
        Images per second between two steps that the workers tell of, and the cores that other
        programs used from the first step told of to the last.
    """
    told: list[tuple[int, float]] = []
    used: list[tuple[float, float, float]] = []

    def hear(event: Mapping[str, Any]) -> None:
        if event["kind"] == "metrics" and "train/loss" in event["values"]:
            told.append((event["step"], event["time_ms"] / 1000))
            cpu = cpu_seconds()
            assert cpu is not None
            used.append((perf_counter(), cpu.ours, cpu.machine))

    try:
        pretrain(recipe, on_event=hear)
    finally:
        ray.shutdown()
    counted = told[int(WARM_UP * len(told)) :]
    (first, began), (last, ended) = counted[0], counted[-1]
    seconds, ours, machine = (
        after - before for before, after in zip(used[0], used[-1], strict=True)
    )
    images_per_s = (last - first) * recipe.optim.global_batch / (ended - began)
    return images_per_s, max(0.0, (machine - ours) / seconds)


def show(console: Console, found: Mapping[str, list[Found]]) -> None:
    """Print medians over rounds, and the line for scripts."""
    table = Table(title="Images per second, medians", title_justify="left")
    for column in ("", "bound by", "predicted", "measured", "predicted / measured", "others"):
        table.add_column(column, justify="left" if column in {"", "bound by"} else "right")
    ratios, quiet = [], True
    for case, every in found.items():
        rounds = [each for each in every if each.others <= QUIET]
        quiet = quiet and bool(rounds)
        rounds = rounds or every
        ratio = median(each.ratio for each in rounds)
        ratios.append(abs(ratio - 1))
        least, most = min(e.ratio for e in rounds), max(e.ratio for e in rounds)
        table.add_row(
            case,
            rounds[-1].bound,
            f"{median(each.predicted for each in rounds):,.0f}",
            f"{median(each.measured for each in rounds):,.0f}",
            f"{ratio:.2f} ({least:.2f} to {most:.2f})",
            f"{fmean(each.others for each in rounds):.1f} cores",
        )
    console.print(table)
    print(
        f"plan cases={len(ratios)} worst={max(ratios):.3f} mean={fmean(ratios):.3f} quiet={quiet}"
    )


if __name__ == "__main__":
    main()
