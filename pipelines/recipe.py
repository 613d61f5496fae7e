"""A recipe: all that one run is told, in one frozen value.

YAML file, command-line flag and Tune trial all make this same class, so a typo or an
impossible value gets the same answer wherever it stood (:mod:`pipelines.cli`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import urlsplit

from droppos.config import Compute, Counts, Grid, Method, Model, Optim, require
from droppos.errors import ConfigError


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Have errors of a method name the section that its fields stand in."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("method.", f"{section}.")) from None


def _require_least(section: str, values: object, **least: int) -> None:
    """Refuse numbers of a section that are too small."""
    for name, smallest in least.items():
        value = getattr(values, name)
        require(value >= smallest, f"{section}.{name}", value, f"{smallest} or more", "see --help")


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Which pictures, how they are cut and in what order they come."""

    path: str | None = None
    """Prepared data set (what `droppos prepare` wrote, with manifest.json): path or s3:// URI."""
    holdout: str | None = None
    """Prepared data set kept out of training, to measure on; none measures nothing."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a random crop, as a fraction of the picture's."""
    flip: bool = True
    """Mirror half of the crops."""
    scaled_decoding: bool = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size where a crop allows it:
    quicker for pictures whose crops are twice the model's size or more; moves pixels by 0.2 of
    255 in the mean."""
    window: int = 1024
    """Images that are shuffled together, from row groups all over the data set; a decode task
    holds one window encoded, as much again waits decoded, and a resumed run re-reads at most one.
    Larger mixes pictures better that lie sorted by class, as parquet may; folders and archives are
    packed mixed."""
    skip_limit: float = 0.001
    """Fraction of the data set's pictures that may be skipped when their turn comes, because they
    are damaged or gone, before the run saves and ends; 0 ends at the first."""
    buffer_mb: float | None = None
    """MB of decoded pictures that may wait for training, over the whole cluster; none takes half
    of Ray's object stores. Where windows do not fit, fewer are decoded at once."""
    decode_cpus: int | None = None
    """CPUs that read and decode, over the whole cluster; none takes all that training leaves."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            "data.crop_scale",
            self.crop_scale,
            "two fractions of the area, 0 < smallest <= largest <= 1",
            "the paper takes 0.2 1.0",
        )
        require(self.window > 0, "data.window", self.window, "positive", "1024 shuffles well")
        require(
            0 <= self.skip_limit <= 1,
            "data.skip_limit",
            self.skip_limit,
            "a fraction from 0 to 1",
            "0.001 ends the run at one picture in a thousand",
        )
        require(
            self.buffer_mb is None or self.buffer_mb > 0,
            "data.buffer_mb",
            self.buffer_mb,
            "positive, or none",
            "a window of 1024 crops of 224 pixels has 154",
        )
        require(
            self.decode_cpus is None or self.decode_cpus > 0,
            "data.decode_cpus",
            self.decode_cpus,
            "positive, or none",
            "without a CPU to decode, training would wait for ever",
        )


HELD_OUT = (
    "holdout/position/skill",
    "holdout/position/accuracy",
    "holdout/position/accuracy_within_one_cell",
    "holdout/position/cross_entropy_nats",
    "holdout/features/knn_skill",
    "holdout/features/knn_accuracy",
    "holdout/features/effective_rank",
)
"""What a checkpoint may be the best by; of each accuracy also `_low_95` and `_high_95`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where a run lives, what it is called, and how often it speaks and saves."""

    name: str = "droppos"
    """Name of the run: its folder below storage, and its name in MLflow."""
    storage: str = "droppos-runs"
    """Folder or s3:// URI below which runs keep their checkpoints."""
    seed: int = 0
    """Seed of weights, order, crops and masks."""
    init_from: str | None = None
    """Trained weights to begin with, in place of new ones: a checkpoint, a run, an export to timm,
    a file of weights of timm, MAE or the DropPos reference (path or s3:// URI), models:/NAME@ALIAS
    of MLflow, or timm:NAME, which timm downloads. The whole encoder must be there; decoders are
    taken if they fit. `--init-from` is short for it. A run that is resumed goes on from its
    checkpoint."""
    workers: int = 1
    """Training workers; on a GPU cluster, one each GPU."""
    min_workers: int | None = None
    """Fewest workers to go on with while nodes are lost: the run shrinks to as many as fit, and
    grows back to run.workers when nodes come, at a checkpoint. Each step stays what it was. None
    waits for all of them."""
    cpus_per_worker: int = 1
    """CPUs reserved for each training worker."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics."""
    checkpoint_every: int = 1000
    """Optimizer steps between two checkpoints; the last step always has one."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Keep for good each checkpoint whose step is a multiple of this; none keeps no others."""
    keep_best: str | None = None
    """Keep, besides, the checkpoint with the best value of this metric of the held-out pictures,
    such as holdout/position/skill or holdout/features/knn_skill; none keeps no others."""
    keep_best_is: Literal["largest", "smallest"] = "largest"
    """Which value of run.keep_best is the best."""
    max_failures: int = 3
    """Times in a row that the workers may be lost, and started again from the newest checkpoint,
    without a newer one in between. Nodes taken back with a notice don't count."""
    hang_timeout_s: float = 600
    """Seconds without any progress after which the workers are taken to hang, are killed, and start
    again. More than the longest step, measurement, compilation or loading of a checkpoint takes."""
    notice_margin_s: float = 20
    """Seconds before a node goes, by its notice, at which its workers leave it; until then they
    go on if nothing else could run them. A checkpoint is made at once, and again on leaving."""
    bad_steps: int = 10
    """Steps since the last checkpoint whose gradient may be NaN or infinite: each is skipped. One
    more takes the run back to that checkpoint, and it goes on without those batches."""
    max_rewinds: int = 2
    """Times a run may be taken back so; then it ends, and names the pictures."""
    record_ids: bool = False
    """Keep which picture was trained on in which step, for `droppos audit`; a few bytes each."""

    def __post_init__(self) -> None:
        require(
            self.name not in {"", ".", ".."} and "/" not in self.name,
            "run.name",
            self.name,
            "one folder name without /",
            "put the folders into run.storage",
        )
        _require_least(
            "run",
            self,
            workers=1,
            cpus_per_worker=1,
            log_every=1,
            checkpoint_every=1,
            keep_checkpoints=1,
            max_failures=0,
            bad_steps=0,
            max_rewinds=0,
            notice_margin_s=0,
            seed=0,
        )
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.workers,
            "run.min_workers",
            self.min_workers,
            f"from 1 to run.workers ({self.workers}), or none",
            "none waits for all workers",
        )
        require(
            self.keep_best is None or self.keep_best.startswith("holdout/"),
            "run.keep_best",
            self.keep_best,
            "a metric that begins with holdout/, or none",
            "holdout/position/skill is one",
        )
        require(
            self.keep_every is None or self.keep_every > 0,
            "run.keep_every",
            self.keep_every,
            "positive, or none",
            "a multiple of run.checkpoint_every",
        )
        require(
            0 < self.hang_timeout_s < float("inf"),
            "run.hang_timeout_s",
            self.hang_timeout_s,
            "a positive number of seconds",
            "600 is plenty for most",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureProtocol:
    """The fixed protocol by which runs are compared: held-out pictures, same masks for all.

    Its ratios stay what they are when method.mask_ratio is searched; otherwise an easier
    task would look like a better model.
    """

    mask_ratio: float = 0.75
    """Fraction of patches hidden while measuring, in [0, 1)."""
    position_mask_ratio: float = 0.75
    """Fraction of visible patches whose position is dropped while measuring, in (0, 1]."""
    pictures: int = 1024
    """At most so many held-out pictures, from all over the data set. Effective rank compares only
    where their number is the same, and k-NN wants some tens of each class."""
    seed: int = 0
    """Seed of the masks."""

    def __post_init__(self) -> None:
        _ = self.method
        require(self.pictures > 0, "measure.pictures", self.pictures, "positive", "1024")

    @property
    def method(self) -> Method:
        """What draws its masks: nothing is smoothed or weighted.

        Raises:
            ConfigError: If a ratio is none.
        """
        with _named("measure"):
            return Method(mask_ratio=self.mask_ratio, position_mask_ratio=self.position_mask_ratio)

    def counts(self, grid: Grid) -> Counts:
        """Count visible and kept patches of a measured picture.

        Raises:
            ConfigError: If nothing would be visible, or nothing asked.
        """
        with _named("measure"):
            return self.method.counts(grid)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure(MeasureProtocol):
    """The protocol, and when and where a run is measured by it."""

    every_epochs: int = 10
    """Epochs between two measurements on the held-out pictures; the end always has one."""
    aside: bool = False
    """Measure a checkpoint in a process of its own while training goes on, and not all workers in
    the training loop while it waits. A checkpoint is made at each such epoch; its figures come a
    little later, with those of a linear probe where the pictures have labels. One measurement is
    under way at a time; of those that come meanwhile the newest is next."""
    aside_cpus: int = 1
    """CPUs that are reserved for it; a GPU that is free when it begins is taken as well."""

    def __post_init__(self) -> None:
        MeasureProtocol.__post_init__(self)  # super() does not know a class with slots
        require(self.every_epochs > 0, "measure.every_epochs", self.every_epochs, "positive", "10")
        require(self.aside_cpus > 0, "measure.aside_cpus", self.aside_cpus, "positive", "1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """Where MLflow is."""

    uri: str | None = None
    """Tracking server or database; none takes MLFLOW_TRACKING_URI, else an SQLite file in the
    run's storage, or in ./droppos-runs of the driver's machine when that is s3://."""
    experiment: str = "droppos"
    """MLflow experiment."""
    price_per_worker_hour: float | None = None
    """What one worker costs an hour, in any currency: its GPU and its share of the nodes that
    decode. With it, cost/price stands beside cost/worker_hours."""

    def __post_init__(self) -> None:
        require(
            self.price_per_worker_hour is None or 0 <= self.price_per_worker_hour < float("inf"),
            "tracking.price_per_worker_hour",
            self.price_per_worker_hour,
            "0 or more, or none",
            "none leaves the price out",
        )
        if self.uri is not None and "@" in urlsplit(self.uri).netloc:
            raise ConfigError(
                "tracking.uri must not hold a user or password, for recipes are written to "
                "storage; put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
                "or the whole address into MLFLOW_TRACKING_URI"
            )


Objective = Literal["position_skill", "knn", "effective_rank"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What `droppos search` tries. Only that job reads this section."""

    space: tuple[str, ...] = (
        "method.position_mask_ratio=choice(0.5, 0.75, 0.9)",
        "method.mask_ratio=choice(0.5, 0.75)",
        "method.sigma=choice(0, 1, 2)",
    )
    """What each field may be: FIELD=choice(...), grid(...), uniform(low, high) or
    loguniform(low, high); `droppos search --space` is short for it."""
    algorithm: Literal["grid", "random", "tpe"] = "random"
    """grid tries every combination of grid(...) fields; random draws; tpe (Optuna's) draws near
    what did well."""
    trials: int = 4
    """Trials of a random or tpe search."""
    max_concurrent: int = 1
    """Trials at once."""
    objective: Objective | Literal["auto"] = "auto"
    """What trials are compared by, on the held-out pictures; larger is better. auto takes knn where
    they have labels, else position_skill."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """asha ends a trial at the end of an epoch in which it was measured if most others did better
    there. pbt (population-based training) has the worst go on from a checkpoint of the best, with
    values near that one's; only fields that may change on the way, such as method.sigma."""
    grace_epochs: int = 0
    """Epochs before asha ends a trial, or pbt replaces one, and with pbt between two times; 0 takes
    measure.every_epochs."""
    reduction_factor: int = 3
    """asha: of so many trials, one goes on past each of its looks."""
    retries: int = 1
    """Times a trial that failed is started again before it is marked as failed."""
    share_stream: bool = True
    """Have trials that train on the same pictures at the same time read and decode them once; they
    wait for each other then, within a few windows."""

    def __post_init__(self) -> None:
        _require_least(
            "search",
            self,
            trials=1,
            max_concurrent=1,
            grace_epochs=0,
            reduction_factor=2,
            retries=0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One pre-training run."""

    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    optim: Optim = field(default_factory=Optim)
    compute: Compute = field(default_factory=Compute)
    data: Data = field(default_factory=Data)
    run: Run = field(default_factory=Run)
    measure: Measure = field(default_factory=Measure)
    tracking: Tracking = field(default_factory=Tracking)
    search: Search = field(default_factory=Search)

    def __post_init__(self) -> None:
        self.method.check(self.model)
        ranks = self.run.workers * self.optim.accumulate
        require(
            self.optim.global_batch % ranks == 0,
            "optim.global_batch",
            self.optim.global_batch,
            f"a multiple of run.workers * optim.accumulate = {ranks}",
            f"take {max(1, self.optim.global_batch // ranks) * ranks}",
        )
        shards = self.compute.shard_ranks or 1
        require(
            self.run.workers % shards == 0,
            "run.workers",
            self.run.workers,
            f"a multiple of compute.shard_ranks = {shards}",
            f"take {max(1, self.run.workers // shards) * shards}",
        )
        if self.data.holdout is not None and self.method.predicts_positions:
            self.measure.counts(self.model.grid)  # or it would fail epochs later
        if self.run.keep_best is not None and self.data.holdout is None:
            raise ConfigError(
                f"run.keep_best {self.run.keep_best} is measured on held-out pictures; set "
                "data.holdout to a prepared data set, or leave run.keep_best out"
            )
        if self.run.keep_best is not None and self.measure.aside:
            raise ConfigError(
                f"run.keep_best {self.run.keep_best} is decided when a checkpoint is made, and "
                "with measure.aside its figures come after that; leave one of the two out"
            )
        if self.compute.strategy == "single" and self.run.workers > 1:
            raise ConfigError(
                f"compute.strategy single has one worker, got run.workers={self.run.workers}; "
                "take ddp or fsdp2, or one worker"
            )

    @property
    def counts(self) -> Counts:
        """Patches of one training image by part."""
        return self.method.counts(self.model.grid)

    @property
    def worker_batch(self) -> int:
        """Images of one micro-batch on one worker."""
        return self.optim.global_batch // (self.run.workers * self.optim.accumulate)

    @property
    def aside_cpus(self) -> int:
        """CPUs that measure checkpoints beside training; 0 where the loop measures, or nobody."""
        return self.measure.aside_cpus if self.measure.aside and self.data.holdout else 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of workers that can share each global batch and the shards, fewest first."""
        fewest = self.run.workers if self.run.min_workers is None else self.run.min_workers
        return tuple(
            workers
            for workers in range(fewest, self.run.workers + 1)
            if self.optim.global_batch % workers == 0
            and workers % (self.compute.shard_ranks or 1) == 0
        )

    def at(self, workers: int) -> "Recipe":
        """Do the same steps with fewer workers, each in more micro-batches that are no larger.

        Args:
            workers: One of `sizes`.
        """
        share = self.optim.global_batch // workers
        fewest = -(-share // self.worker_batch)
        accumulate = next(n for n in range(fewest, share + 1) if share % n == 0)
        return replace(
            self,
            run=replace(self.run, workers=workers, min_workers=None),
            optim=replace(self.optim, accumulate=accumulate),
        )

    @property
    def home(self) -> str:
        """Folder of the run: storage/name."""
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"
