"""What the method can be told: frozen dataclasses, checked where they are made.

Every number a run depends on is a field here or in :mod:`pipelines.recipe`. A value that
follows from others is a property, never stored twice.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Literal, NamedTuple

from droppos.errors import ConfigError

Size = Literal["tiny", "small", "base", "large", "huge"]
Conformance = Literal["paper", "reference", "reference_as_trained"]


class Shape(NamedTuple):
    """Width, depth and heads of a standard vision transformer."""

    width: int
    depth: int
    heads: int
    patch_size: int


SHAPES: dict[Size, Shape] = {
    "tiny": Shape(192, 12, 3, 16),
    "small": Shape(384, 12, 6, 16),
    "base": Shape(768, 12, 12, 16),
    "large": Shape(1024, 24, 16, 16),
    "huge": Shape(1280, 32, 16, 14),
}


class Grid(NamedTuple):
    """Rows and columns of the patch grid. Cell (row, column) has index row * columns + column."""

    rows: int
    columns: int

    @property
    def cells(self) -> int:
        """Number of positions, N in the paper."""
        return self.rows * self.columns


class Counts(NamedTuple):
    """How many patches of one image play which part."""

    cells: int
    """N: positions of the grid, the classes of the position head."""
    visible: int
    """V: patches that reach the encoder."""
    kept: int
    """K: visible patches that keep their position."""

    @property
    def scored(self) -> int:
        """V - K: visible patches whose position is dropped and asked for."""
        return self.visible - self.kept

    @property
    def chance(self) -> float:
        """Accuracy of the best guess that looks at no picture: any cell not already taken."""
        return 1 / (self.cells - self.kept)


def require(ok: bool, field: str, value: object, expected: str, way_out: str) -> None:
    """Refuse a setting, naming it, its value, what was expected and what to do.

    Raises:
        ConfigError: If not ok.
    """
    if not ok:
        raise ConfigError(f"{field} must be {expected}, got {value!r}; {way_out}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The vision transformer and the decoder that is thrown away after pre-training."""

    size: Size = "base"
    """Standard shape of the encoder: tiny, small, base, large (patch 16) or huge (patch 14)."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of a training crop, in pixels."""
    patch_size: int | None = None
    """Side of a square patch, in pixels; the size's own (16, huge 14) when not given."""
    width: int | None = None
    """Channels of a token, in place of the size's own."""
    depth: int | None = None
    """Transformer blocks, in place of the size's own."""
    heads: int | None = None
    """Attention heads, in place of the size's own."""
    decoder_width: int = 512
    """Channels of a token in the decoder."""
    decoder_depth: int = 2
    """Transformer blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""

    def __post_init__(self) -> None:
        shape = self.shape
        for name in ("width", "depth", "heads", "patch_size"):
            value = getattr(shape, name)
            require(value > 0, f"model.{name}", value, "positive", "leave it out for the size's")
        for side, pixels in zip(("height", "width"), self.image_size, strict=True):
            require(
                pixels > 0 and pixels % shape.patch_size == 0,
                f"model.image_size ({side})",
                pixels,
                f"a positive multiple of the patch size {shape.patch_size}",
                f"take {max(1, round(pixels / shape.patch_size)) * shape.patch_size}",
            )
        require(
            shape.width % shape.heads == 0,
            "model.heads",
            shape.heads,
            f"a divisor of the width {shape.width}",
            "each head takes an equal share of the channels",
        )
        require(
            shape.width % 4 == 0,
            "model.width",
            shape.width,
            "a multiple of 4",
            "sine and cosine of row and column take a quarter of the channels each",
        )
        require(
            self.decoder_width > 0 and self.decoder_width % 4 == 0,
            "model.decoder_width",
            self.decoder_width,
            "a positive multiple of 4",
            "512 is the paper's",
        )
        require(self.decoder_depth > 0, "model.decoder_depth", self.decoder_depth, "positive", "2")
        require(
            self.decoder_heads > 0 and self.decoder_width % self.decoder_heads == 0,
            "model.decoder_heads",
            self.decoder_heads,
            f"a divisor of decoder_width {self.decoder_width}",
            "16 is the paper's for 512 channels",
        )

    @property
    def shape(self) -> Shape:
        """Width, depth, heads and patch size after overrides."""
        base = SHAPES[self.size]
        given = (self.width, self.depth, self.heads, self.patch_size)
        return Shape(*(d if g is None else g for g, d in zip(given, base, strict=True)))

    @property
    def grid(self) -> Grid:
        """The patch grid of a training crop."""
        height, width = self.image_size
        patch = self.shape.patch_size
        return Grid(height // patch, width // patch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Attention heads of another project's weights, whose shapes don't tell them."""

    encoder: int | None = None
    """Of the encoder's blocks; the standard size's when not given."""
    decoder: int | None = None
    """Of the decoder's blocks; 16 for 512 channels when not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """The pre-text task: what is hidden, what is asked, how an answer is scored."""

    objective: Literal["position", "position_pixels", "pixels"] = "position"
    """position: DropPos. position_pixels: with the extra pixel task. pixels: plain masked
    autoencoding, the baseline (positions are all kept)."""
    mask_ratio: float = 0.75
    """Fraction of patches hidden from the encoder, in [0, 1)."""
    position_mask_ratio: float = 0.75
    """Fraction of the visible patches whose position is dropped, in (0, 1]."""
    sigma: float = 1.0
    """Width of the smoothed target, in patches (not pixels); 0 asks for the exact cell."""
    sigma_decay: Literal["constant", "epoch", "step", "epoch_to_zero"] = "epoch"
    """How sigma falls: sigma * (1 - epoch / epochs) per whole epoch, the same per step, or per
    epoch so that the last epoch has exactly 0."""
    attentive: bool = True
    """Weigh each patch by its likeness to the class token of the full picture (section 3.3)."""
    tau: float = 0.1
    """Temperature of the attentive weights; smaller trusts fewer patches."""
    guide: Literal["picture", "half", "visible", "student"] = "picture"
    """What the attentive weights are read from. picture: the whole picture with all positions, as
    published. The others cost less and say something else (docs/step.md). half: the picture at
    half its height and width. visible: the visible patches with all their positions. student: the
    student's own features, without the dropped positions; no second pass at all."""
    guide_depth: int | None = None
    """Encoder blocks of the guide's pass; all of them, as published, when not given."""
    dropped_token: Literal["learnt", "zeros", "wrong"] = "learnt"
    """What stands for a dropped position: one learnt token, nothing, or another cell's position."""
    shuffle: bool = False
    """Feed the visible patches in one more random order. Attention does not see order (a test
    shows it); the reference offers it, so it is here."""
    ignore_confident: bool = False
    """Leave out patches that the model already places at least as surely as the target does."""
    position_weight: float = 0.05
    """Weight of the position loss beside the pixel loss (objective position_pixels)."""
    normalise_pixels: bool = True
    """Pixel targets have zero mean and unit variance in each patch."""
    conformance: Conformance = "paper"
    """paper: as published. reference: as the authors' code computes, where that differs
    (docs/reference.md lists it). reference_as_trained: also its smoothing map for a 16-wide
    grid on a narrower one, as its published flags had it."""

    def __post_init__(self) -> None:
        require(
            0 <= self.mask_ratio < 1,
            "method.mask_ratio",
            self.mask_ratio,
            "in [0, 1)",
            "with 1 no patch is left to look at; the paper takes 0.75",
        )
        require(
            0 < self.position_mask_ratio <= 1,
            "method.position_mask_ratio",
            self.position_mask_ratio,
            "in (0, 1]",
            "with 0 there is no position to predict, so no loss; the paper takes 0.75",
        )
        require(0 <= self.sigma < float("inf"), "method.sigma", self.sigma, "0 or more", "try 1")
        require(
            0 < self.tau < float("inf"), "method.tau", self.tau, "above 0", "the paper takes 0.1"
        )
        require(
            0 <= self.position_weight < float("inf"),
            "method.position_weight",
            self.position_weight,
            "0 or more",
            "the reference takes 0.05",
        )
        require(
            self.guide_depth is None or self.guide_depth > 0,
            "method.guide_depth",
            self.guide_depth,
            "positive",
            "leave it out for all blocks of the encoder",
        )
        require(
            self.guide_depth is None or self.guide != "student",
            "method.guide_depth",
            self.guide_depth,
            "left out where method.guide is student",
            "the student's features are those of its last block",
        )
        if self.shuffle and self.objective != "position" and self.conformance != "paper":
            raise ConfigError(
                "method.shuffle with a pixel task is not offered under "
                f"method.conformance={self.conformance}: the reference leaves its tokens unsorted "
                "there, so it reconstructs the wrong patches; use conformance=paper"
            )

    @property
    def predicts_positions(self) -> bool:
        """Whether there is a position head."""
        return self.objective != "pixels"

    @property
    def predicts_pixels(self) -> bool:
        """Whether there is a pixel decoder."""
        return self.objective != "position"

    @property
    def guided(self) -> bool:
        """Whether the loss needs the likeness of patches to the class token."""
        return self.attentive and self.predicts_positions

    def check(self, model: Model) -> None:
        """Refuse what this model cannot be trained on.

        Raises:
            ConfigError: If the ratios leave nothing to see or to ask on its grid, or conformance or
                guide need another grid or more blocks.
        """
        self.counts(model.grid)
        require(
            self.conformance != "reference_as_trained" or model.grid == Grid(14, 14),
            "method.conformance",
            self.conformance,
            f"another on a grid of {model.grid.rows} x {model.grid.columns} patches",
            "it reproduces a slip made on one of 14 x 14; reference computes the rest as it does",
        )
        require(
            self.guide != "half" or (model.grid.rows % 2 == 0 and model.grid.columns % 2 == 0),
            "method.guide",
            self.guide,
            f"another than half on a grid of {model.grid.rows} x {model.grid.columns} patches",
            "half needs an even number of rows and of columns",
        )
        require(
            self.guide_depth is None or self.guide_depth <= model.shape.depth,
            "method.guide_depth",
            self.guide_depth,
            f"at most the encoder's {model.shape.depth} blocks",
            "leave it out for all of them",
        )

    def counts(self, grid: Grid) -> Counts:
        """Count visible and kept patches of one image on this grid.

        V = floor(N * (1 - mask_ratio)) and K = floor(V * (1 - position_mask_ratio)), taken
        exactly on the decimal ratios as written. The reference multiplies in floating point,
        where 10 * (1 - 0.8) is 1.99..., so keeps 1 and not 2; its conformance does the same.

        Raises:
            ConfigError: If nothing would be visible, or nothing asked.
        """
        if self.conformance == "paper":
            visible = floor(grid.cells * (1 - Fraction(str(self.mask_ratio))))
            kept = floor(visible * (1 - Fraction(str(self.position_mask_ratio))))
        else:
            visible = int(grid.cells * (1 - self.mask_ratio))
            kept = int(visible * (1 - self.position_mask_ratio))
        where = f"on a grid of {grid.rows} x {grid.columns} = {grid.cells} patches"
        if visible < 1:
            raise ConfigError(
                f"method.mask_ratio {self.mask_ratio} leaves no visible patch {where}; "
                f"at most {floor(1e4 * (1 - 1 / grid.cells)) / 1e4:g} keeps one: lower it, or use "
                "smaller patches"
            )
        if self.predicts_positions and visible == kept:
            raise ConfigError(
                f"method.position_mask_ratio {self.position_mask_ratio} drops the position of none "
                f"of the {visible} visible patches {where}, so nothing is asked; raise it"
            )
        if self.predicts_positions and grid.cells < 2:
            raise ConfigError(
                f"a single patch has only one position, so nothing is asked {where}; "
                "use a larger model.image_size or a smaller model.patch_size"
            )
        if self.predicts_pixels and visible == grid.cells:
            raise ConfigError(
                f"method.mask_ratio {self.mask_ratio} hides no patch {where}, so the pixel task "
                f"(objective {self.objective}) has nothing to reconstruct; raise it"
            )
        return Counts(grid.cells, visible, visible if self.objective == "pixels" else kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    """How the weights move: AdamW, linear warm-up per step, then a cosine to min_lr."""

    epochs: int = 800
    """Passes over the data."""
    global_batch: int = 1024
    """Images per optimizer step, over all workers and accumulated micro-batches."""
    accumulate: int = 1
    """Micro-batches per optimizer step on each worker; the step equals that of one large batch."""
    lr_per_256: float = 1.5e-4
    """Peak learning rate for 256 images per step; the peak used is lr_per_256 * global_batch / 256.
    """
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.05
    """AdamW's decay; 1-D parameters and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    clip_norm: float | None = 5.0
    """Largest gradient norm, over all parameters together (the reference: of each tensor)."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, "optim.epochs", self.epochs, "positive", "the paper takes 800")
        require(self.global_batch > 0, "optim.global_batch", self.global_batch, "positive", "1024")
        require(self.accumulate > 0, "optim.accumulate", self.accumulate, "positive", "1 is none")
        require(
            0 < self.lr_per_256 < float("inf"),
            "optim.lr_per_256",
            self.lr_per_256,
            "above 0",
            "the paper takes 1.5e-4",
        )
        require(
            0 <= self.min_lr <= self.peak_lr,
            "optim.min_lr",
            self.min_lr,
            f"between 0 and the peak {self.peak_lr:g}",
            "0 is the paper's",
        )
        require(
            0 <= self.warmup_epochs <= self.epochs,
            "optim.warmup_epochs",
            self.warmup_epochs,
            f"between 0 and optim.epochs ({self.epochs})",
            "a twentieth of the epochs is usual",
        )
        require(
            0 <= self.weight_decay < float("inf"),
            "optim.weight_decay",
            self.weight_decay,
            "0 or more",
            "the paper takes 0.05",
        )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas,
            "two numbers in [0, 1)",
            "the paper takes 0.9 0.95",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            "optim.clip_norm",
            self.clip_norm,
            "above 0, or none",
            "the published flags take 5",
        )

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of warm-up."""
        return self.lr_per_256 * self.global_batch / 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How a step is spread over devices, and in which precision it computes."""

    strategy: Literal["single", "ddp", "fsdp2"] = "fsdp2"
    """single: one worker. ddp: every worker holds all weights. fsdp2: weights, gradients and
    optimizer state are sharded, one unit per transformer block."""
    precision: Literal["float32", "bf16"] = "bf16"
    """Arithmetic of forward and backward; weights and optimizer state stay float32.

    bf16: under single and ddp autocast, so that products are bf16 and what blocks hand on and norms
    are float32; under fsdp2 all of it but the loss is bf16, and what travels between workers with
    it, but for the sum of the gradients. float32: cuDNN may still take TF32 for the convolution
    that embeds patches, as is torch's default.
    """
    guide_precision: Literal["bf16", "same"] = "bf16"
    """Arithmetic of the attentive guide, which has no gradient. bf16: where the device has units
    for it (a CPU may not), also under a float32 student, whose loss moves by parts in ten thousand.
    same: the student's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when the worker was given one."""
    compile: bool = False
    """Compile each transformer block with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    shard_ranks: int | None = None
    """fsdp2: ranks among which a copy of the weights is sharded, the GPUs of a node, say; each
    further group holds a copy of its own. All ranks when not given."""
    shard_unit: Literal["block", "model"] = "block"
    """fsdp2: what is gathered at once. model is one gather and one scatter a step, for models so
    small that calls cost more than memory."""
    reshard_after_forward: bool = True
    """fsdp2: free a block's gathered weights after its forward pass; off trades memory for
    one gather less."""

    def __post_init__(self) -> None:
        if self.shard_ranks is not None:
            require(
                self.shard_ranks > 0,
                "compute.shard_ranks",
                self.shard_ranks,
                "positive",
                "leave it out to shard over all ranks",
            )
            require(
                self.strategy == "fsdp2",
                "compute.strategy",
                self.strategy,
                "fsdp2 where compute.shard_ranks is given",
                "only fsdp2 shards: leave compute.shard_ranks out",
            )
