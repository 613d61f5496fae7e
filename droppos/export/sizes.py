"""A trained encoder for pictures of another size.

Fixed sine and cosine positions could be computed for any grid, but then a larger picture has
coordinates that no block has seen. So positions are resampled: the picture keeps the range of
coordinates it was trained with, divided finer or coarser. That is what the field does before it
fine-tunes at another resolution (ViT, DeiT, MAE), what timm does when it is told another
``img_size``, and the one way for positions that were learnt.
"""

from copy import deepcopy
from dataclasses import replace

from droppos.encoder import build_encoder, positions, resample_positions
from droppos.trained import Trained


def at_size(trained: Trained, image_size: tuple[int, int]) -> Trained:
    """Give the encoder for another size of picture; its weights stay, its positions are resampled.

    Args:
        trained: Stays as it is, and is given back where the size is its own.
        image_size: Height and width, in pixels.

    Returns:
        The encoder (or classifier) alone at another size: a position head knows the cells of one
        grid only.

    Raises:
        ConfigError: If the size is no multiple of the patch size.
    """
    if tuple(image_size) == trained.model.image_size:
        return trained
    model = replace(trained.model, image_size=tuple(image_size))
    if trained.classes:
        classifier = deepcopy(trained.encoder)
        classifier.set_input_size(img_size=model.image_size)  # timm resamples as we do
        return Trained(classifier, model, classes=trained.classes)
    encoder = build_encoder(model)
    stretched = resample_positions(positions(trained.encoder), trained.model.grid, model.grid)
    encoder.load_state_dict({**trained.encoder.state_dict(), "pos_embed": stretched})
    return Trained(encoder.eval(), model)
