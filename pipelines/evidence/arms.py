"""What is compared, and what is taken of each. Imports no torch: the command line lists it."""

from dataclasses import dataclass
from typing import Any, Literal

from droppos.errors import ConfigError

Kind = Literal["pre-trained", "supervised", "untrained", "pixels"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the things that are compared."""

    name: str
    title: str
    kind: Kind = "pre-trained"
    method: tuple[tuple[str, Any], ...] = ()
    """Fields of `method` that differ from the recipe's."""

    @property
    def trained(self) -> bool:
        """Whether it computes anything before it is measured."""
        return self.kind in {"pre-trained", "supervised"}


ARMS = (
    Arm("paper", "DropPos (paper)"),
    Arm("no_smoothing", "without position smoothing", method=(("sigma", 0.0),)),
    Arm("no_attentive", "without attentive reconstruction", method=(("attentive", False),)),
    Arm("student_guide", "attentive by the student's own pass", method=(("guide", "student"),)),
    Arm("no_patch_mask", "without patch masking", method=(("mask_ratio", 0.0),)),
    Arm("reference", "as the reference computes", method=(("conformance", "reference"),)),
    Arm("position_pixels", "with the pixel task", method=(("objective", "position_pixels"),)),
    Arm("pixels", "masked autoencoding alone", method=(("objective", "pixels"),)),
    Arm("supervised", "supervised from scratch, as much in all", kind="supervised"),
    Arm("random", "random initialisation", kind="untrained"),
    Arm("raw", "raw pixels", kind="pixels"),
)

BY_NAME = {arm.name: arm for arm in ARMS}

FIGURES = {
    "knn": "20 nearest neighbours",
    "linear": "linear probe",
    "blocks": "linear probe, all blocks",
    "tenth": "fine-tuned, 10 % of labels",
    "all": "fine-tuned, all labels",
    "position": "position skill, own head",
    "location": "position read from frozen features",
    "rank": "effective rank",
}
"""What is taken, and its name on the page."""


@dataclass(frozen=True, slots=True)
class Name:
    """Which cell."""

    arm: str
    budget: int
    seed: int

    @classmethod
    def parse(cls, text: str) -> "Name":
        """Read ARM/BUDGET/SEED.

        Raises:
            ConfigError: If it names no cell.
        """
        arm, _, numbers = text.partition("/")
        budget, _, seed = numbers.partition("/")
        if arm not in BY_NAME or not (budget.isdecimal() and seed.isdecimal()):
            raise ConfigError(
                f"{text!r} names no cell; expected ARM/BUDGET/SEED, such as paper/5/0, where ARM "
                f"is one of {', '.join(BY_NAME)}"
            )
        if (int(budget) > 0) != BY_NAME[arm].trained:
            raise ConfigError(
                f"{text!r} names no cell: the budget of {arm} is "
                f"{'1 or more' if BY_NAME[arm].trained else '0, for nothing is trained'}"
            )
        return cls(arm, int(budget), int(seed))

    def __str__(self) -> str:
        return f"{self.arm}/{self.budget}/{self.seed}"

    @property
    def folder(self) -> str:
        """A name without slashes."""
        return f"{self.arm}-{self.budget}-{self.seed}"

    @property
    def about(self) -> Arm:
        """What its arm is."""
        return BY_NAME[self.arm]


def figures_of(arm: Arm, curve: bool = False) -> list[str]:
    """List the figures that an arm has, in the order in which they are taken.

    Args:
        arm: What is measured.
        curve: Only what a curve against compute shows.
    """
    kind = arm.kind
    if kind == "pixels":
        return ["knn", "knn_1_l2", "linear", "location"]
    own = kind == "pre-trained" and arm.name != "pixels"
    figures = ["knn", "linear", "blocks", "rank", "location", *(["position"] if own else [])]
    figures += ["tenth"] if curve else ["tenth", "all"]
    return figures
