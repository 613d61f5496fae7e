"""Training that takes seconds: a tiny model, in this process, on tiles that lie in memory."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from droppos.config import Method, Model
from droppos.masking import draw, draw_noise
from droppos.model import DropPos, normalise

TILE_MODEL = Model(
    size="tiny",
    image_size=(48, 48),
    patch_size=8,
    width=64,
    depth=3,
    heads=4,
    decoder_width=64,
    decoder_depth=1,
    decoder_heads=4,
)
METHOD = Method(mask_ratio=0.0, position_mask_ratio=0.75, attentive=False)


def trained(pictures: NDArray[np.uint8], steps: int, seed: int = 0) -> DropPos:
    """Train by plain cross-entropy on whole tiles: what stands in the frame stays there."""
    torch.manual_seed(seed)
    model = DropPos(TILE_MODEL, METHOD)
    counts = METHOD.counts(model.grid)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (32,), generator=generator)
        batch = torch.from_numpy(pictures)[chosen]
        masks = draw(counts, METHOD, draw_noise(counts, METHOD, generator, len(batch)))
        logits = model(normalise(batch), masks).logits
        assert logits is not None
        loss = F.cross_entropy(logits.flatten(0, 1), masks.asked.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()
