"""The same number of operations for every arm.

Every arm is the recipe `cifar` with some fields changed, for as many epochs as its step leaves of
the budget: a step without the attentive pass costs half, so it gets twice as many.
"""

from dataclasses import replace

from droppos.config import Model
from droppos.flops import FORWARD_BACKWARD, blocks, linear, step_flops
from droppos.measure.finetune_recipe import Finetune
from pipelines.evidence.arms import Arm
from pipelines.evidence.recipes import changed
from pipelines.recipe import Recipe

TRAIN = 50_000
"""Pictures of an epoch."""


def at_budget(recipe: Recipe, arm: Arm, budget: int) -> Recipe:
    """Give an arm as many whole epochs as come nearest to the budget, and at least one.

    Args:
        recipe: The recipe that all arms start from.
        arm: A pre-trained one.
        budget: In epochs of the recipe as it is.
    """
    own = changed(recipe, arm)
    epochs = budget * step_flops(recipe.model, recipe.method) / step_flops(own.model, own.method)
    return _lasting(own, max(1, round(epochs)))


def supervised_at_budget(
    recipe: Recipe, finetune: Finetune, budget: int, more: int, rows: int = TRAIN
) -> Finetune:
    """Let supervised training compute what pre-training and fine-tuning do together.

    Args:
        recipe: The recipe that all arms start from.
        finetune: How it is trained.
        budget: Of pre-training, in epochs of the recipe as it is.
        more: Epochs of fine-tuning.
        rows: Pictures of an epoch of both.
    """
    before = budget * TRAIN * step_flops(recipe.model, recipe.method)
    own = rows * supervised_flops(recipe.model)
    return lasting(finetune, max(1, round(before / own + more)))


def supervised_flops(model: Model) -> float:
    """Count the operations of one image's step of a classifier; its head is left out."""
    width, cells = model.shape.width, model.grid.cells
    embedding = linear(cells, 3 * model.shape.patch_size**2, width)
    tokens = 1 + cells
    return 2 * embedding + FORWARD_BACKWARD * blocks(model.shape.depth, tokens, tokens, width)


def lasting(finetune: Finetune, epochs: int) -> Finetune:
    """Let a fine-tuning take so many epochs, a tenth of them warm-up."""
    return replace(
        finetune, optim=replace(finetune.optim, epochs=epochs, warmup_epochs=epochs / 10)
    )


def _lasting(recipe: Recipe, epochs: int) -> Recipe:
    warmup = min(recipe.optim.warmup_epochs, epochs / 4)
    return replace(recipe, optim=replace(recipe.optim, epochs=epochs, warmup_epochs=warmup))
