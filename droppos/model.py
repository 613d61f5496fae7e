"""The model: an encoder, and the light decoders that pre-train it.

What is learnt: given the looks of a few patches, most of them without a position, say where
each stood. Only visible patches enter the encoder; positions are fixed 2-D sine and cosine,
so nothing about place can hide in a learnt table (paper section 3.2).

Axes in this file
    B  images on this rank
    N  cells in the patch grid (rows * columns)
    V  visible patches of an image; H = N - V hidden ones
    S  visible patches whose position is asked for (scored)
    T  tokens of an image: the class token and its patches
    D  channels of a token in the encoder
    P  pixels of a patch, times 3
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from droppos import guide
from droppos.config import Method, Model
from droppos.encoder import (
    Block,
    build_encoder,
    encode,
    layer_norm,
    positions,
    run_blocks,
    sincos_positions,
    take,
)
from droppos.masking import Draw

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Prediction(NamedTuple):
    """What the model says of a batch."""

    logits: Float[Tensor, "B S N"] | None
    """Over the cells of the grid, for each patch in ``draw.scored`` and in its order; None without
    a position head."""
    pixels: Float[Tensor, "B H P"] | None
    """Of each hidden patch, row by row, channels last; None without a pixel head."""
    similarity: Float[Tensor, "B V"] | None
    """Cosine of class token and each visible patch as the guide sees them; None unless asked for.
    """


def normalise(
    images: UInt8[Tensor, "B rows columns 3"], mirrored: Bool[Tensor, "B"] | None = None
) -> Float[Tensor, "B 3 rows columns"]:
    """Scale to ImageNet's mean and deviation, on the device that holds the images.

    Args:
        images: RGB.
        mirrored: Which of them to mirror, left to right; none when not given.
    """
    # Planes first: with three channels innermost, the same arithmetic takes twice as long on a CPU.
    planes = images.permute(0, 3, 1, 2).contiguous()
    if mirrored is not None:
        planes = _mirror(planes, mirrored)
    mean = _per_channel(IMAGENET_MEAN, images.device)
    std = _per_channel(IMAGENET_STD, images.device)
    return planes.float().sub_(mean).div_(std)


def _per_channel(shares: Sequence[float], device: torch.device) -> Float[Tensor, "3 1 1"]:
    # Filled and not copied there: a copy from pageable memory would wait for the device.
    return torch.stack([torch.full((1, 1), share * 255, device=device) for share in shares])


def _mirror(
    planes: UInt8[Tensor, "B 3 rows columns"], mirrored: Bool[Tensor, "B"]
) -> UInt8[Tensor, "B 3 rows columns"]:
    # A gather and no mask: on a GPU, indexing by a mask would wait for the device.
    straight = torch.arange(planes.shape[3], device=planes.device)
    columns = torch.where(mirrored[:, None], straight.flip(0), straight)
    return planes.gather(3, columns[:, None, None, :].expand_as(planes))


class DropPos(nn.Module):
    """Encoder and decoders of one pre-training task."""

    def __init__(self, model: Model, method: Method) -> None:
        """Make the modules and give them their first values (paper appendix A).

        Raises:
            ConfigError: If the method cannot be trained on this model (:meth:`Method.check`).
        """
        super().__init__()
        method.check(model)
        self.method = method
        self.grid = model.grid
        self.guide_dtype: torch.dtype | None = None
        """Precision of the guide where it differs from the student's, as droppos.parallel chose."""
        width = model.shape.width
        self.encoder = build_encoder(model)
        self.dropped_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_decoder = PositionDecoder(model) if method.predicts_positions else None
        self.pixel_decoder = PixelDecoder(model) if method.predicts_pixels else None
        self._initialise()

    def _initialise(self) -> None:
        self.apply(_initialise_linear)
        projection = self.encoder.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
        assert self.encoder.cls_token is not None
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        if self.method.dropped_token == "learnt" and self.method.predicts_positions:
            nn.init.normal_(self.dropped_token, std=0.02)
        else:
            self.dropped_token.requires_grad_(False)
        if self.pixel_decoder is not None:
            nn.init.normal_(self.pixel_decoder.mask_token, std=0.02)
            if self.method.conformance != "paper" and self.method.dropped_token != "learnt":
                self.pixel_decoder.mask_token.requires_grad_(False)  # the reference's slip

    def forward(
        self, images: Float[Tensor, "B 3 rows columns"], draw: Draw, guided: bool = False
    ) -> Prediction:
        """Predict what the draw hides.

        Args:
            images: Normalised images of the model's size.
            draw: Which patches are seen, and which of those without a position.
            guided: Also find, without gradient, the likeness of each visible patch to the class
                token, as ``method.guide`` says.
        """
        patches = self.encoder.patch_embed(images)
        similarity = None
        if guided and self.method.guide != "student":
            # Before the student: what it keeps for its backward pass is not yet in memory.
            similarity = guide.similarity(
                self.encoder,
                self.method,
                self.grid,
                images,
                patches.detach(),
                draw,
                self.guide_dtype,
            )
        tokens = encode(self.encoder, self._visible_tokens(patches, draw))
        if guided and self.method.guide == "student":
            similarity = guide.cosine(tokens.detach())
        logits = pixels = None
        if self.position_decoder is not None:
            logits = self.position_decoder(tokens, draw.scored)
        if self.pixel_decoder is not None:
            pixels = self.pixel_decoder(tokens, draw)
        return Prediction(logits, pixels, similarity)

    def encode_whole(self, images: Float[Tensor, "B 3 rows columns"]) -> Float[Tensor, "B T D"]:
        """Encode all patches with all positions: what a backbone does with a picture.

        A second way into the model, besides a call of it. FSDP2 is told of it (droppos.parallel):
        it gathers sharded weights, so all ranks must come. DDP has nothing to add without a
        gradient: call it on the model inside.
        """
        patches = self.encoder.patch_embed(images)
        return encode(self.encoder, patches + positions(self.encoder)[:, 1:])

    def _visible_tokens(
        self, patches: Float[Tensor, "B N D"], draw: Draw
    ) -> Float[Tensor, "B V D"]:
        own = self._positions(draw.visible)
        if self.method.dropped_token == "wrong" and draw.wrong is not None:
            stand_in = self._positions(draw.wrong)
        else:
            stand_in = self.dropped_token  # zeros, when it is not learnt
        return take(patches, draw.visible) + torch.where(draw.dropped[..., None], stand_in, own)

    def _positions(self, cells: Int[Tensor, "B V"]) -> Float[Tensor, "B V D"]:
        return positions(self.encoder)[0][cells + 1]


class PositionDecoder(nn.Module):
    """Let the visible patches confer, then name a cell for those asked; it knows no positions."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embed = nn.Linear(model.shape.width, model.decoder_width)
        self.blocks = _decoder_blocks(model)
        self.norm = layer_norm(model.decoder_width)
        self.head = nn.Linear(model.decoder_width, model.grid.cells)

    def forward(
        self, tokens: Float[Tensor, "B T D"], asked: Int[Tensor, "B S"]
    ) -> Float[Tensor, "B S N"]:
        """Give the logits of some visible patches.

        Args:
            tokens: Of the encoder, the class token first.
            asked: Which of the visible patches, 0 the first: ``draw.scored``.
        """
        tokens = run_blocks(list(self.blocks), self.embed(tokens), asked + 1)
        return self.head(self.norm(tokens))


class PixelDecoder(nn.Module):
    """Reconstruct hidden patches from the visible ones and all positions (masked autoencoding)."""

    positions: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embed = nn.Linear(model.shape.width, model.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, model.decoder_width))
        self.blocks = _decoder_blocks(model)
        self.norm = layer_norm(model.decoder_width)
        self.head = nn.Linear(model.decoder_width, model.shape.patch_size**2 * 3)
        self.register_buffer(
            "positions", sincos_positions(model.grid, model.decoder_width), persistent=False
        )

    def forward(self, tokens: Float[Tensor, "B T D"], draw: Draw) -> Float[Tensor, "B H P"]:
        """Give the pixels of the hidden patches, in the order of ``draw.hidden``."""
        tokens = self.embed(tokens)
        masks = self.mask_token.expand(*draw.hidden.shape, -1)
        patches = torch.cat([tokens[:, 1:], masks], dim=1)
        cells = torch.cat([draw.visible, draw.hidden], dim=1)
        # FSDP2 casts parameters, not buffers, and a float32 one would make all tokens float32.
        positions = self.positions[0].to(self.mask_token.dtype)
        # Attention does not see order, so the patches need no putting back into rows.
        tokens = torch.cat([tokens[:, :1], patches + positions[cells + 1]], dim=1)
        first, last = 1 + draw.visible.shape[1], tokens.shape[1]
        hidden = torch.arange(first, last, device=tokens.device).expand(len(tokens), -1)
        return self.head(self.norm(run_blocks(list(self.blocks), tokens, hidden)))


def _decoder_blocks(model: Model) -> nn.ModuleList:
    return nn.ModuleList(
        Block(model.decoder_width, model.decoder_heads, qkv_bias=True, norm_layer=layer_norm)
        for _ in range(model.decoder_depth)
    )


def _initialise_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
