"""What fine-tuning can be told. Imports no torch: the command line lists it."""

from dataclasses import dataclass, field

from droppos.config import Optim, require


def _published() -> Optim:
    return Optim(
        epochs=100,
        global_batch=1024,
        lr_per_256=5e-4,
        min_lr=1e-6,
        warmup_epochs=5,
        weight_decay=0.05,
        betas=(0.9, 0.999),
        clip_norm=None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune:
    """How a backbone is fine-tuned; the defaults are those for a ViT-B on ImageNet-1k."""

    optim: Optim = field(default_factory=_published)
    """AdamW and its schedule: 100 epochs (a ViT-L takes 50), batch 1024, peak 5e-4 for 256 images,
    5 epochs of warm-up."""
    layer_decay: float = 0.75
    """Learning rate of each layer over that of the layer above it, in (0, 1]."""
    drop_path: float = 0.1
    """Share of images for which the last block's branches are left out; block by block it rises to
    this from 0."""
    mixup: float = 0.8
    """Images are blended in pairs by a weight from Beta(mixup, mixup); 0 blends none."""
    cutmix: float = 1.0
    """A rectangle of another image is pasted, whose area comes from Beta(cutmix, cutmix); 0 pastes
    none. With mixup, each step does one of the two, at random."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    random_erasing: float = 0.25
    """Share of images of which a rectangle is replaced by noise."""
    augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of a RandAugment of each image, here of magnitude 9; empty does none."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a fraction of the picture's."""

    def __post_init__(self) -> None:
        require(
            0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "in (0, 1]", "1 is none"
        )
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "in [0, 1)", "0 is none")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), name, value, "0 or more", "0 is none")
        smoothing, erasing = self.label_smoothing, self.random_erasing
        require(0 <= smoothing < 1, "label_smoothing", smoothing, "in [0, 1)", "0 is none")
        require(0 <= erasing <= 1, "random_erasing", erasing, "in [0, 1]", "0 is none")
        require(
            self.augment == "" or self.augment.startswith("rand"),
            "augment",
            self.augment,
            "one of timm's RandAugment, whose names begin with rand, or empty",
            "rand-m9-mstd0.5-inc1 is the published one",
        )
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            "crop_scale",
            self.crop_scale,
            "two fractions of the area, 0 < smallest <= largest <= 1",
            "0.08 1.0 is usual for fine-tuning",
        )

    @property
    def mixes(self) -> bool:
        """Whether images are blended or pasted, which goes by pairs."""
        return self.mixup > 0 or self.cutmix > 0
