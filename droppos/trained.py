"""A trained model, as much of it as is known: what is exported, measured and drawn."""

from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer

from droppos.config import Method, Model
from droppos.errors import DataError
from droppos.model import DropPos


@dataclass(frozen=True, slots=True)
class Trained:
    """An encoder in eval mode on the CPU, and what was trained with it."""

    encoder: VisionTransformer
    model: Model
    task: DropPos | None = None
    """The same encoder with all its decoders; None where only the encoder is known."""
    classes: tuple[str, ...] = ()
    """Of a fine-tuned classifier: what its head tells apart; `encoder` is the whole model then."""

    @property
    def whole(self) -> DropPos:
        """Encoder and every decoder, as they were trained.

        Raises:
            DataError: If only the encoder is known.
        """
        if self.task is None:
            raise DataError("this backbone has no decoder; name the checkpoint it was made from")
        return self.task

    @property
    def droppos(self) -> DropPos | None:
        """The encoder with its position head, if it has one."""
        predicts = self.task is not None and self.task.method.predicts_positions
        return self.task if predicts else None

    @property
    def method(self) -> Method | None:
        """How it was pre-trained; None where only the encoder is known."""
        return None if self.task is None else self.task.method
