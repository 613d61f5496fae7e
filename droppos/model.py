"""The model: a timm vision transformer, and the light decoders that pre-train it.

What is learnt: given the looks of a few patches, most of them without a position, say where
each stood. Only visible patches enter the encoder; positions are fixed 2-D sine and cosine,
so nothing about place can hide in a learnt table (paper section 3.2).

Axes in this file
    B  images on this rank
    N  cells in the patch grid (rows * columns)
    V  visible patches of an image; H = N - V hidden ones
    T  tokens of an image: the class token and its patches
    D  channels of a token in the encoder
    P  pixels of a patch, times 3
"""

from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from jaxtyping import Bool, Float, Int, UInt8
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from droppos.config import SHAPES, Grid, Method, Model
from droppos.masking import Draw

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_layer_norm: Any = partial(nn.LayerNorm, eps=1e-6)


class Prediction(NamedTuple):
    """What the model says of a batch."""

    logits: Float[Tensor, "B V N"] | None
    """Over the cells of the grid, for each visible patch; None without a position head."""
    pixels: Float[Tensor, "B H P"] | None
    """Of each hidden patch, row by row, channels last; None without a pixel head."""
    similarity: Float[Tensor, "B V"] | None
    """Cosine of class token and each visible patch when the whole picture is seen; None unless
    asked for."""


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
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1) * 255
    return planes.float().sub_(mean).div_(std)


def _mirror(
    planes: UInt8[Tensor, "B 3 rows columns"], mirrored: Bool[Tensor, "B"]
) -> UInt8[Tensor, "B 3 rows columns"]:
    # A gather and no mask: on a GPU, indexing by a mask would wait for the device.
    straight = torch.arange(planes.shape[3], device=planes.device)
    columns = torch.where(mirrored[:, None], straight.flip(0), straight)
    return planes.gather(3, columns[:, None, None, :].expand_as(planes))


def sincos_positions(grid: Grid, width: int) -> Float[Tensor, "1 T width"]:
    """Build fixed 2-D positions, row 0 for the class token (zeros).

    The first half of the channels tells the column, the second the row; in each, sines then
    cosines of geometric frequencies from 1 to 1/10000.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(places: Float[Tensor, "N"]) -> Float[Tensor, "N half"]:
        angles = places[:, None] * frequency
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    cell = torch.arange(grid.cells)
    cells = torch.cat(
        [encode((cell % grid.columns).double()), encode((cell // grid.columns).double())], dim=1
    )
    return torch.cat([torch.zeros(1, width), cells.float()])[None]


def timm_arguments(config: Model) -> tuple[str, dict[str, Any]]:
    """Name the timm architecture and the arguments that make it this encoder."""
    shape = config.shape
    standard = SHAPES[config.size]
    arguments: dict[str, Any] = {"img_size": config.image_size}
    for argument, value, usual in (
        ("patch_size", shape.patch_size, standard.patch_size),
        ("embed_dim", shape.width, standard.width),
        ("depth", shape.depth, standard.depth),
        ("num_heads", shape.heads, standard.heads),
    ):
        if value != usual:
            arguments[argument] = value
    return f"vit_{config.size}_patch{standard.patch_size}_224", arguments


def build_encoder(config: Model) -> VisionTransformer:
    """Make the timm encoder: no classes, fixed positions."""
    name, arguments = timm_arguments(config)
    encoder = timm.create_model(name, num_classes=0, **arguments)
    assert isinstance(encoder, VisionTransformer)
    encoder.pos_embed = nn.Parameter(
        sincos_positions(config.grid, config.shape.width), requires_grad=False
    )
    return encoder


class DropPos(nn.Module):
    """Encoder and decoders of one pre-training task."""

    def __init__(self, model: Model, method: Method) -> None:
        """Make the modules and give them their first values (paper appendix A).

        Raises:
            ConfigError: If the ratios leave nothing to see or to ask on this grid.
        """
        super().__init__()
        method.counts(model.grid)
        self.method = method
        self.grid = model.grid
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
            guided: Also look at the whole picture, without gradient, for the likeness of each
                visible patch to the class token.
        """
        patches = self.encoder.patch_embed(images)
        similarity = self._similarity(patches.detach(), draw) if guided else None
        tokens = self._encode(self._visible_tokens(patches, draw))
        logits = pixels = None
        if self.position_decoder is not None:
            logits = self.position_decoder(tokens)
        if self.pixel_decoder is not None:
            pixels = self.pixel_decoder(tokens, draw)
        return Prediction(logits, pixels, similarity)

    def _visible_tokens(
        self, patches: Float[Tensor, "B N D"], draw: Draw
    ) -> Float[Tensor, "B V D"]:
        positions = self._positions(draw.visible)
        if self.method.dropped_token == "wrong" and draw.wrong is not None:
            stand_in = self._positions(draw.wrong)
        else:
            stand_in = self.dropped_token  # zeros, when it is not learnt
        positions = torch.where(draw.dropped[..., None], stand_in, positions)
        return take(patches, draw.visible) + positions

    @property
    def _all_positions(self) -> Float[Tensor, "1 T D"]:
        assert self.encoder.pos_embed is not None
        return self.encoder.pos_embed

    def _positions(self, cells: Int[Tensor, "B V"]) -> Float[Tensor, "B V D"]:
        return self._all_positions[0][cells + 1]

    def _encode(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B S D"]:
        assert self.encoder.cls_token is not None
        first = self.encoder.cls_token + self._all_positions[:, :1]
        tokens = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.encoder.blocks:
            tokens = block(tokens)
        return self.encoder.norm(tokens)

    @torch.no_grad()
    def _similarity(self, patches: Float[Tensor, "B N D"], draw: Draw) -> Float[Tensor, "B V"]:
        tokens = self._encode(patches + self._all_positions[:, 1:])
        visible = take(tokens[:, 1:], draw.visible)
        return F.cosine_similarity(exact(visible), exact(tokens[:, :1]), dim=-1)


class PositionDecoder(nn.Module):
    """Let the visible patches confer, then name a cell for each; it knows no positions."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embed = nn.Linear(model.shape.width, model.decoder_width)
        self.blocks = _decoder_blocks(model)
        self.norm = _layer_norm(model.decoder_width)
        self.head = nn.Linear(model.decoder_width, model.grid.cells)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B V N"]:
        """Give the logits of every visible patch, the class token's left out."""
        tokens = self.embed(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[:, 1:]))


class PixelDecoder(nn.Module):
    """Reconstruct hidden patches from the visible ones and all positions (masked autoencoding)."""

    positions: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embed = nn.Linear(model.shape.width, model.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, model.decoder_width))
        self.blocks = _decoder_blocks(model)
        self.norm = _layer_norm(model.decoder_width)
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
        # Attention does not see order, so the patches need no putting back into rows.
        tokens = torch.cat([tokens[:, :1], patches + self.positions[0][cells + 1]], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[:, 1 + draw.visible.shape[1] :]))


def _decoder_blocks(model: Model) -> nn.ModuleList:
    return nn.ModuleList(
        Block(model.decoder_width, model.decoder_heads, qkv_bias=True, norm_layer=_layer_norm)
        for _ in range(model.decoder_depth)
    )


def _initialise_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def exact(values: Tensor) -> Tensor:
    """Lift half precision to float32; float64 stays what it is."""
    return values if values.dtype == torch.float64 else values.float()


def take(tokens: Float[Tensor, "B N D"], cells: Int[Tensor, "B V"]) -> Float[Tensor, "B V D"]:
    """Pick the tokens of the given cells, image by image."""
    return tokens.gather(1, cells[..., None].expand(-1, -1, tokens.shape[-1]))
