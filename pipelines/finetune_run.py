"""Where and how widely a backbone is fine-tuned. Imports no torch: the command line lists it."""

from dataclasses import dataclass
from typing import Literal

from droppos.config import Compute
from pipelines.recipe import Data, Run


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRun:
    """One fine-tuning, but for its recipe and its data: what of a pre-training's run it has."""

    name: str = "finetune"
    """Name of the run: its folder below storage, and its name in MLflow."""
    storage: str = "droppos-runs"
    """Folder or s3:// URI below which runs keep their checkpoints."""
    seed: int = 0
    """Seed of the head, the order, the crops and all that is drawn."""
    workers: int = 1
    """Training workers; on a GPU cluster, one each GPU."""
    min_workers: int | None = None
    """Fewest workers to go on with while nodes are lost, as in a pre-training; what is drawn in a
    step depends on their number. None waits for all of them."""
    cpus_per_worker: int = 1
    """CPUs reserved for each training worker."""
    decode_cpus: int | None = None
    """CPUs that read, decode and augment, over the whole cluster; none takes all that training
    leaves."""
    window: int = 1024
    """Images that are shuffled together, from row groups all over the data set."""
    precision: Literal["float32", "bf16"] = "bf16"
    """Arithmetic of forward and backward; weights and optimizer state stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU for each worker if the cluster shows as many."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics."""
    checkpoint_every: int = 1000
    """Optimizer steps between two checkpoints; the end of each epoch has one besides."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    hang_timeout_s: float = 600
    """Seconds without any progress after which the workers are taken to hang, are killed, and start
    again. More than the longest step takes, which on CPUs may be minutes."""
    max_failures: int = 3
    """Times in a row that workers may be lost, and started again, without a newer checkpoint."""

    def __post_init__(self) -> None:
        _ = self.run, self.data("", "")  # their checks are ours

    @property
    def run(self) -> Run:
        """The same as a part of a pre-training's recipe."""
        return Run(
            name=self.name,
            storage=self.storage,
            seed=self.seed,
            workers=self.workers,
            min_workers=self.min_workers,
            cpus_per_worker=self.cpus_per_worker,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            hang_timeout_s=self.hang_timeout_s,
            max_failures=self.max_failures,
        )

    @property
    def compute(self) -> Compute:
        """Whole copies of the model, in that precision."""
        return Compute(strategy="ddp", precision=self.precision, device=self.device)

    def data(self, path: str, holdout: str, crop_scale: tuple[float, float] = (0.08, 1.0)) -> Data:
        """The stream of a data set."""
        return Data(
            path=path,
            holdout=holdout,
            crop_scale=crop_scale,
            window=self.window,
            decode_cpus=self.decode_cpus,
        )
