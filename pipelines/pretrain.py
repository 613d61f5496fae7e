"""The main job: pictures stream in, a vision transformer comes out.

The driver starts the workers (:mod:`pipelines.worker`), hears of their progress and keeps the
ledger. A job is a function of its recipe: the command line, a Tune trial, a test and a
submitted Ray job call the same one.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from droppos.errors import ConfigError, DataError, DropposError, TrainingError
from pipelines import checkpoints
from pipelines.attempt import claim_for_driver
from pipelines.backbone import from_checkpoint
from pipelines.cluster import Share, connect, decode_tasks_of, gpu_workers
from pipelines.events import Events
from pipelines.facts import check_resume
from pipelines.gallery import draw_gallery
from pipelines.holdout import load_pictures
from pipelines.ledger import Ledger, local_folder
from pipelines.order import Schedule
from pipelines.recipe import Recipe
from pipelines.recipe_file import to_yaml
from pipelines.shards import load_manifest
from pipelines.skipped import FILE, Skipped
from pipelines.storage import open_place
from pipelines.stream import Remaining, data_config
from pipelines.worker import Job, train_worker

logger = logging.getLogger(__name__)

DRAWN = 256
"""Held-out pictures that the driver, which has no GPU, looks at for its drawings."""

POLL_S = 0.2
"""Seconds between two looks at what the workers said."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

OnEvent = Callable[[Mapping[str, Any]], None]
"""Told of each event in order, in the driver: a live line, a Tune report."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a run ended."""

    home: str
    checkpoint: checkpoints.Saved | None
    """Newest complete one."""
    steps: int
    """Steps the whole run has."""
    metrics: dict[str, float]
    """Last value of each, of what this process heard."""
    pictures: list[Path]
    """Files drawn at the end, on this machine."""
    tracking_run: str
    """Identifier of the MLflow run."""

    @property
    def finished(self) -> bool:
        """Whether the last step is done and kept."""
        return self.checkpoint is not None and self.checkpoint.step == self.steps


def pretrain(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    on_event: OnEvent | None = None,
    parent_run: str | None = None,
) -> Outcome:
    """Run, or go on with, one pre-training.

    Ctrl-C or SIGTERM asks the workers for one more checkpoint and ends the run there; a second
    one ends it at once.

    Args:
        recipe: The run.
        resume: Go on from the newest checkpoint of run.storage/run.name, if there is one.
        allow_changes: Resume even if data or recipe differ from the checkpoint's.
        on_event: Hears of progress.
        parent_run: MLflow run that this one is shown under.

    Raises:
        ConfigError: If the recipe cannot be run here.
        DataError: If data or storage cannot be read.
        TrainingError: If the workers failed more often than run.max_failures.
    """
    recipe = located(recipe)
    schedule = plan(recipe)
    home = open_place(recipe.home)
    home.check_reachable()
    saved = checkpoints.newest(home)
    check_resume(recipe, schedule, saved, resume=resume, allow_changes=allow_changes)
    (home / "recipe.yaml").write_bytes(to_yaml(recipe).encode())
    share = connect(recipe)
    with Ledger.open(
        recipe, schedule.manifest.digest, resume=saved is not None, parent_run=parent_run
    ) as ledger:
        skipped = Skipped(
            home,
            schedule.manifest.rows,
            recipe.data.skip_limit,
            resumed=saved is not None and saved.record["manifest"] == schedule.manifest.digest,
        )
        heard = Heard(ledger, skipped, on_event)
        heard.event({"kind": "plan", "step": saved.step if saved else 0, "steps": schedule.steps})
        if saved is None or saved.step < schedule.steps:
            fit(recipe, schedule, share, heard)
        newest = checkpoints.newest(home)
        pictures = draw_run(recipe, newest, ledger) if newest else []
        for picture in pictures:
            ledger.picture(picture, f"pictures/{picture.name}")
        finished = newest is not None and newest.step == schedule.steps
        ledger.finish("FINISHED" if finished else "KILLED")
    return Outcome(recipe.home, newest, schedule.steps, heard.last, pictures, ledger.run_id)


def located(recipe: Recipe) -> Recipe:
    """Spell out every place: workers have another current folder than the driver."""

    def spelt(uri: str | None) -> str | None:
        return None if uri is None else open_place(uri).uri

    return replace(
        recipe,
        data=replace(recipe.data, path=spelt(recipe.data.path), holdout=spelt(recipe.data.holdout)),
        run=replace(recipe.run, storage=open_place(recipe.run.storage).uri),
    )


def plan(recipe: Recipe) -> Schedule:
    """Lay out the whole run: every batch of every epoch.

    Raises:
        ConfigError: If no data is named, or a batch is larger than the data.
        DataError: If the data set cannot be read.
    """
    if recipe.data.path is None:
        raise ConfigError(
            "data.path is not set; name a prepared data set: `droppos prepare PICTURES DATA`, "
            "then `droppos pretrain --data.path DATA`"
        )
    if recipe.data.holdout is not None:
        load_manifest(open_place(recipe.data.holdout))  # missing now is better than missing later
    return Schedule(
        manifest=load_manifest(open_place(recipe.data.path)),
        seed=recipe.run.seed,
        global_batch=recipe.optim.global_batch,
        window=recipe.data.window,
        epochs=recipe.optim.epochs,
    )


def fit(recipe: Recipe, schedule: Schedule, share: Share, heard: "Heard") -> None:
    """Train on the cluster until the last step, a request to stop, or too many failures.

    Raises:
        TrainingError: If the workers failed more often than run.max_failures.
        DropposError: As raised in a worker.
    """
    home = open_place(recipe.home)
    on_gpu = gpu_workers(recipe)
    # Decided once, here: a worker that sees a GPU it was not given must leave it alone.
    device = "cuda" if on_gpu else "cpu"
    recipe = replace(recipe, compute=replace(recipe.compute, device=device))
    events = Events.start()
    driver = claim_for_driver(home)  # workers of an older driver, if any are left, give up
    trainer = TorchTrainer(
        partial(train_worker, Job(recipe, schedule, events, driver)),
        datasets={"train": Remaining(recipe, schedule, decode_tasks_of(recipe, share))},
        dataset_config=data_config(recipe.data.buffer_mb),
        scaling_config=ScalingConfig(
            num_workers=recipe.run.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": recipe.run.cpus_per_worker, "GPU": int(on_gpu)},
        ),
        run_config=RunConfig(
            name="ray",  # Ray's own bookkeeping; ours is in checkpoints/
            storage_path=home.path,
            storage_filesystem=home.fs,
            failure_config=FailureConfig(max_failures=recipe.run.max_failures),
        ),
    )
    try:
        with stop_on_signal(events) as abort:
            running = in_background(trainer.fit)
            while not running.done():
                if abort.is_set():
                    raise KeyboardInterrupt
                heard.drain(events)
                if heard.too_many is not None:
                    events.request_stop()
                sleep(POLL_S)
    except BaseException:
        ray.shutdown()  # whatever went wrong here, workers must not go on by themselves
        raise
    heard.drain(events)
    error = running.exception()
    if isinstance(error, TrainingFailedError):
        raise cause_of(error) from error
    if error is not None:
        raise error
    if heard.failure is not None:
        raise TrainingError(heard.failure)
    if heard.too_many is not None:
        raise heard.too_many


def in_background(job: Callable[[], object]) -> Future[object]:
    """Run a job in a thread that ends with this process.

    On the main thread `fit` would take Ctrl-C for itself, and drop the last steps.
    """
    result: Future[object] = Future()

    def run() -> None:
        try:
            result.set_result(job())
        except BaseException as error:  # handed on to whoever asks for the result
            result.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return result


def draw_run(recipe: Recipe, saved: checkpoints.Saved, ledger: Ledger) -> list[Path]:
    """Draw what the newest checkpoint makes of the held-out pictures, if there are any.

    A picture that cannot be drawn is a warning: the run itself is done and kept.
    """
    if recipe.data.holdout is None or not recipe.method.predicts_positions:
        return []
    folder = local_folder(recipe) / recipe.run.name / "pictures"
    try:
        model = from_checkpoint(saved).whole
        pictures = load_pictures(
            recipe.data.holdout, recipe.model.image_size, min(recipe.measure.pictures, DRAWN)
        )
        return draw_gallery(model, recipe.measure, pictures, ledger.history, folder)[1]
    except (DropposError, OSError, RuntimeError) as error:
        logger.warning("the run's pictures could not be drawn: %s", error)
        return []


class Heard:
    """Takes what workers say to the ledger and to whoever listens."""

    def __init__(self, ledger: Ledger, skipped: Skipped, on_event: OnEvent | None) -> None:
        self._ledger = ledger
        self._skipped = skipped
        self._on_event = on_event
        self.last: dict[str, float] = {}
        """Last value of each metric."""
        self.failure: str | None = None
        """Why the workers gave up, all at once, where starting them again would not help."""

    @property
    def too_many(self) -> DataError | None:
        """Why the run must end, once too many pictures had to be skipped."""
        return self._skipped.too_many

    def drain(self, events: Events) -> None:
        """Take all that has arrived."""
        for event in events.drain():
            self.event(event)
        if self._skipped.write():
            self._ledger.text(FILE, self._skipped.text())

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event."""
        match event["kind"]:
            case "metrics":
                self.last |= event["values"]
                self._ledger.log(event["step"], event["values"])
            case "skipped":
                self._skip(event)
            case "failed":
                self.failure = event["error"]
            case "checkpoint":
                self._ledger.checkpoint(event["saved"])
        if self._on_event is not None:
            self._on_event(event)

    def _skip(self, event: Mapping[str, Any]) -> None:
        if self._skipped.add(event["step"], event["problems"]):
            self._ledger.log(event["step"], {"data/pictures_skipped": len(self._skipped)})


@contextmanager
def stop_on_signal(events: Events) -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into a request for one more checkpoint; the second one aborts.

    Only a main thread is sent signals; elsewhere (a Tune trial) nothing changes.

    Yields:
        An event that is set when the run is to end at once.
    """
    abort = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield abort
        return
    asked = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            abort.set()
            return
        asked = True
        logger.warning(
            "%s: saving a last checkpoint, then ending; once more ends at once, without it",
            signal.Signals(number).name,
        )
        events.request_stop()

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield abort
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cause_of(error: TrainingFailedError) -> DropposError:
    """Find our own error in what the workers raised; the others only saw a peer go."""
    failures = list(getattr(error, "worker_failures", {}).values())
    failures.append(getattr(error, "controller_failure", error))
    for failure in failures:
        link: BaseException | None = failure
        while link is not None:
            if isinstance(link, DropposError):
                return link
            link = getattr(link, "cause", None) or link.__cause__
    last = str(failures[0]).strip().splitlines()[-1]
    return TrainingError(
        f"the workers failed more often than run.max_failures allows; the last time: {last}; "
        "the newest checkpoint is kept, --resume goes on from it"
    )
