"""Seconds of a training step by formula: arithmetic, and what the network must carry.

Arithmetic is the step's FLOPs (:mod:`droppos.flops`) over a share of the GPU's peak, but no less
than it takes to launch the kernels. Communication (:mod:`pipelines.plan.rings`) hides behind a
part of it.
"""

from dataclasses import dataclass

from droppos.flops import step_flops
from pipelines.instances import Instance
from pipelines.plan.question import Question
from pipelines.recipe import Recipe

CPU_FLOPS = 39e9
"""Operations per second of one CPU in a training step: measured, docs/step.md (ViT-B, float32, 2
CPUs of an AMD EPYC, 6.2 s for 8 images)."""
LAUNCH_S = 0.5e-3
"""Seconds to launch one block's kernels, forward and backward, an assumption: some 60 of them."""
GUIDE_LAUNCH_S = 0.15e-3
"""Seconds for a block of the guide, an assumption."""
OVERLAP = 0.6
"""Share of the arithmetic behind which communication hides, an assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One optimizer step of all workers, in seconds."""

    arithmetic_s: float
    """Forward and backward, by FLOPs."""
    launch_s: float
    """Least time of these, however few the images."""
    communication_s: float
    """Of gradients and weights, hidden or not."""

    @property
    def compute_s(self) -> float:
        """What a worker takes when it is alone."""
        return max(self.arithmetic_s, self.launch_s)

    @property
    def exposed_s(self) -> float:
        """Communication that hides behind nothing."""
        return max(0.0, self.communication_s - OVERLAP * self.compute_s)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute_s + self.exposed_s

    @property
    def bound(self) -> str:
        """Name what most of the step is."""
        if self.exposed_s > self.compute_s:
            return "communication"
        return "GPU step" if self.arithmetic_s >= self.launch_s else "kernel launches"


def step_time(
    recipe: Recipe, machine: Instance, question: Question, communication_s: float
) -> StepTime:
    """Estimate a step.

    Args:
        recipe: With its workers and micro-batches.
        machine: They run on.
        question: Share of the peak that is reached, or the pace that was measured.
        communication_s: What the workers send one another takes.
    """
    images = recipe.optim.global_batch / recipe.run.workers
    depth = recipe.model.shape.depth + recipe.model.decoder_depth
    launch = LAUNCH_S * depth
    if recipe.method.guided:
        launch += GUIDE_LAUNCH_S * (recipe.method.guide_depth or recipe.model.shape.depth)
    arithmetic = (
        images * step_flops(recipe.model, recipe.method) / _speed(recipe, machine, question.mfu)
    )
    if question.images_per_worker_s is not None:
        arithmetic, launch = images / question.images_per_worker_s, 0.0
    return StepTime(
        arithmetic_s=arithmetic,
        launch_s=launch * recipe.optim.accumulate,
        communication_s=communication_s,
    )


def _speed(recipe: Recipe, machine: Instance, mfu: float) -> float:
    """Operations per second of one worker."""
    half = recipe.compute.precision == "bf16"
    tflops = machine.bf16_tflops if half else machine.float32_tflops
    if tflops is None:
        return CPU_FLOPS * recipe.run.cpus_per_worker
    return mfu * tflops * 1e12
