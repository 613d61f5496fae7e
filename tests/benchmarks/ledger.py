"""Take MLflow away from a real run, kill its driver meanwhile, and count what the history lacks.

    python -m tests.benchmarks.ledger [--steps 2200] [--outage-s 60] [--rounds 200]

A run of the demo's recipe with one worker logs every step to a real MLflow server over HTTP. In
mid-run the server is killed. Half the outage later the driver is killed (-9) with all that it could
not send in its journal; `--resume` goes on while the server is still away, and another half later
the server is back. The history is then compared with what each step should have left: steps 1 to
the last, each metric once; and with what storage has beside the checkpoints.

Before that, what a step waits for its logging is measured, beside what it would wait for MLflow's
own client. The last line is for scripts.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ray
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from rich.console import Console
from rich.table import Table

from pipelines import checkpoints, history
from pipelines.demo import with_demo_pictures
from pipelines.events import Events
from pipelines.ledger import pointer
from pipelines.local_mlflow import LocalMlflow
from pipelines.recipe_file import from_dict, read
from pipelines.storage import open_place

EVERY_STEP = ("train/loss", "train/grad_norm", "train/lr", "data/images_per_s")
STEPS_PER_EPOCH = 112
CLIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def main() -> None:
    """Measure, and print a table and the line for scripts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2200, help="steps of the run, about")
    parser.add_argument("--outage-s", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=200, help="rows to time")
    args = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **CLIENT}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = LocalMlflow(folder / "mlflow")
        server.start()
        try:
            with console.status("timing rows"):
                ours, theirs = step_costs(server.uri, args.rounds)
            epochs = max(1, round(args.steps / STEPS_PER_EPOCH))
            outcome = outage(folder, server, epochs, args.outage_s, console)
        finally:
            server.kill()
    table = Table(title="What a step that logs 15 values waits, in ms", title_justify="left")
    for heading in ("", "median", "largest"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, costs in ("droppos", ours), ("MLflow's client", theirs):
        table.add_row(label, f"{statistics.median(costs):.3f}", f"{max(costs):.3f}")
    console.print(table)
    cost, direct = statistics.median(ours), statistics.median(theirs)
    console.print(f"MLflow's client takes {direct / cost:.0f} times as long")
    console.print(f"history whole {outcome.replayed_s:.1f} s after the server was back")
    print(
        f"ledger steps={outcome.steps} missing={outcome.missing} doubled={outcome.doubled} "
        f"step_cost_ms={cost:.3f}"
    )
    sys.exit(bool(outcome.missing or outcome.doubled))


def step_costs(uri: str, rounds: int) -> tuple[list[float], list[float]]:
    """Time handing over a row of 15 values: to the driver's mailbox, and to MLflow at once.

    Returns:
        Milliseconds of each, both ways.
    """
    values = {f"group/metric_{i}": 0.1 * i for i in range(15)}
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        events = Events.start()
        events.send({"kind": "first"})
        events.flush(60)
        ours = timed(rounds, lambda step: events.send({"step": step, "values": values}))
    finally:
        ray.shutdown()
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("costs")).info.run_id

    def log(step: int) -> None:
        metrics = [Metric(name, value, 1, step) for name, value in values.items()]
        client.log_batch(run_id, metrics, synchronous=True)

    return ours, timed(rounds, log)


def timed(rounds: int, act: Callable[[int], object]) -> list[float]:
    """Time some calls, a few ms apart as steps are."""
    found = []
    for step in range(rounds):
        began = time.perf_counter()
        act(step)
        found.append(1000 * (time.perf_counter() - began))
        time.sleep(0.005)
    return found[rounds // 10 :]


class Outcome:
    """What the history has after all."""

    def __init__(self, steps: int, missing: int, doubled: int, replayed_s: float) -> None:
        self.steps = steps
        self.missing, self.doubled = missing, doubled
        """Values that are not there, and values that are there again."""
        self.replayed_s = replayed_s


def outage(
    folder: Path, server: LocalMlflow, epochs: int, outage_s: float, console: Console
) -> Outcome:
    """Run the demo with an outage and a kill in it."""
    storage = folder / "runs"
    content = read("demo")
    content["run"] |= {"storage": str(storage)}
    recipe, _, _ = with_demo_pictures(from_dict(content))
    assert recipe.data.path is not None
    command = [
        *(sys.executable, "-m", "pipelines.cli", "pretrain", "demo", "--resume"),
        *("--data.path", recipe.data.path, "--run.storage", str(storage)),
        *("--run.workers", "1", "--run.log-every", "1", "--run.checkpoint-every", "100"),
        *("--optim.epochs", str(epochs), "--tracking.uri", server.uri),
    ]
    home = open_place(f"{storage}/demo")
    client = MlflowClient(server.uri)
    with console.status("training, with MLflow there") as status:
        first = start(command, folder)
        wait_for(lambda: last_step(client, pointer(home).get("run_id")) > 100, first)
        status.update("training, with MLflow away")
        server.kill()
        time.sleep(outage_s / 2)
        kill(first)
        status.update("the driver was killed (-9) and goes on, with MLflow away")
        second = start(command, folder)
        time.sleep(outage_s / 2)
        server.start()
        back = time.monotonic()
        status.update("training, with MLflow back")
        saved = checkpoints.newest(home)
        assert saved is not None
        run_id = pointer(home)["run_id"]
        wait_for(lambda: last_step(client, run_id) >= saved.step, second)
        replayed_s = time.monotonic() - back
        if second.wait() != 0:
            sys.exit((folder / "log").read_text()[-3000:])
    return compare(client, run_id, home.uri, replayed_s)


def compare(client: MlflowClient, run_id: str, home: str, replayed_s: float) -> Outcome:
    """Hold MLflow's history against the steps, and against storage's."""
    place = open_place(home)
    saved = checkpoints.newest(place)
    assert saved is not None
    kept = history.curves(place, saved.step)
    missing = doubled = 0
    for name in EVERY_STEP:
        found = Counter(point.step for point in client.get_metric_history(run_id, name))
        missing += sum(found[step] == 0 for step in range(1, saved.step + 1))
        doubled += sum(count - 1 for count in found.values())
    for name, points in kept.items():
        if name not in EVERY_STEP:  # rarer ones: where storage has them
            steps = [point.step for point in client.get_metric_history(run_id, name)]
            missing += len({step for step, _ in points} - set(steps))
            doubled += len(steps) - len(set(steps))
    return Outcome(saved.step, missing, doubled, replayed_s)


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a driver; what it says goes to a file."""
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a driver, not its Ray: the workers are to notice by themselves."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def last_step(client: MlflowClient, run_id: str | None) -> int:
    """Ask MLflow how far a run is; -1 if it does not know."""
    if run_id is None:
        return -1
    try:
        metrics = client.get_run(run_id).data.to_proto().metrics
    except MlflowException:
        return -1
    return max((metric.step for metric in metrics if metric.key == "train/loss"), default=-1)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until something holds, or the process has ended."""
    while process.poll() is None and not what():
        time.sleep(0.2)


if __name__ == "__main__":
    main()
