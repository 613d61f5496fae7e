"""The smallest model with every part, for tests that need one; `replace` varies it."""

from droppos.config import Model

TINY = Model(
    size="tiny",
    image_size=(32, 48),
    patch_size=8,
    width=48,
    depth=2,
    heads=4,
    decoder_width=32,
    decoder_heads=4,
)
