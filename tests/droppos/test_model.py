import subprocess
import sys

import pytest
import timm
import torch
from torch.nn import functional as F

from droppos.config import Method, Model
from droppos.encoder import encode, timm_arguments
from droppos.masking import Draw, draw, draw_noise
from droppos.model import DropPos, normalise
from tests.droppos.tiny import TINY


def masks(method: Method, images: int = 3, config: Model = TINY) -> Draw:
    counts = method.counts(config.grid)
    return draw(
        counts, method, draw_noise(counts, method, torch.Generator().manual_seed(0), images)
    )


def test_importing_the_method_imports_no_pipeline() -> None:
    probe = (
        "import sys, droppos.step, droppos.measure.position, droppos.export.formats; "
        "import droppos.foreign; "
        "others = {'ray', 'mlflow', 'pyarrow', 'pipelines', 'transformers', 'onnx'}; "
        "print(*sorted(others & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


def test_importing_pictures_does_not_pay_for_torch() -> None:
    probe = "import sys, droppos.pictures; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_shapes_on_a_grid_that_is_not_square() -> None:
    method = Method(objective="position_pixels", mask_ratio=0.5)
    drawn = masks(method)
    prediction = DropPos(TINY, method)(torch.rand(3, 3, 32, 48), drawn, guided=True)
    assert prediction.logits is not None and prediction.logits.shape == (3, 9, 24)
    assert prediction.pixels is not None and prediction.pixels.shape == (3, 12, 192)
    assert prediction.similarity is not None and prediction.similarity.shape == (3, 12)
    assert not prediction.similarity.requires_grad


def test_with_all_seen_and_placed_the_encoder_is_timms_own() -> None:
    method = Method(mask_ratio=0)
    model = DropPos(TINY, method).eval()
    images = torch.rand(2, 3, 32, 48)
    everything = torch.arange(24).expand(2, -1)
    drawn = Draw(everything, everything[:, :0], everything[:, :0])
    patches = model.encoder.patch_embed(images)
    ours = encode(model.encoder, model._visible_tokens(patches, drawn))
    torch.testing.assert_close(ours, model.encoder.forward_features(images))


def test_a_dropped_patch_says_nothing_of_its_place() -> None:
    """Move a picture's patches about: where all positions are dropped, logits move with them."""
    method = Method(mask_ratio=0, position_mask_ratio=1)
    model = DropPos(TINY, method).eval()
    images = torch.rand(1, 3, 32, 48)
    moved = images.roll(8, dims=3)
    cells = torch.arange(24)[None]
    drawn = Draw(cells, cells, cells[:, :0])
    still = model(images, drawn).logits.view(4, 6, 24)
    shifted = model(moved, drawn).logits.view(4, 6, 24)
    torch.testing.assert_close(shifted, still.roll(1, dims=1), atol=1e-5, rtol=1e-4)


def test_order_carries_no_information() -> None:
    method = Method(mask_ratio=0.5)
    model = DropPos(TINY, method).eval()
    images = torch.rand(3, 3, 32, 48)
    drawn = masks(method)
    order = torch.randperm(12)
    scored = order.argsort()[drawn.scored]
    other = Draw(drawn.visible[:, order], scored, drawn.hidden)
    assert (other.dropped == drawn.dropped[:, order]).all()
    a, b = model(images, drawn, guided=True), model(images, other, guided=True)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a.similarity[:, order], b.similarity, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("token", ["learnt", "zeros", "wrong"])
@pytest.mark.parametrize("conformance", ["paper", "reference"])
def test_which_tokens_are_trained(token: str, conformance: str) -> None:
    method = Method(
        objective="position_pixels",
        dropped_token=token,  # pyright: ignore[reportArgumentType]
        conformance=conformance,  # pyright: ignore[reportArgumentType]
    )
    model = DropPos(TINY, method)
    assert model.dropped_token.requires_grad == (token == "learnt")
    assert model.pixel_decoder is not None
    frozen = conformance == "reference" and token != "learnt"
    assert model.pixel_decoder.mask_token.requires_grad != frozen
    prediction = model(torch.rand(3, 3, 32, 48), masks(method))
    (prediction.logits.sum() + prediction.pixels.sum()).backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()


def test_wrong_tokens_are_the_positions_of_other_cells() -> None:
    method = Method(mask_ratio=0, dropped_token="wrong")
    model = DropPos(TINY, method)
    drawn = masks(method)
    tokens = model._visible_tokens(torch.zeros(3, 24, 48), drawn)
    positions = model.encoder.pos_embed[0, 1:]
    expected = torch.where(drawn.dropped, drawn.wrong, drawn.visible)
    torch.testing.assert_close(tokens, positions[expected])


def test_positions_are_fixed_unique_and_zero_for_the_class_token() -> None:
    positions = DropPos(TINY, Method()).encoder.pos_embed
    assert positions is not None and not positions.requires_grad
    assert (positions[0, 0] == 0).all()
    assert torch.cdist(positions[0, 1:], positions[0, 1:]).fill_diagonal_(1).min() > 0.1


def test_normalise_gives_imagenets_mean_and_deviation() -> None:
    images = torch.full((1, 2, 2, 3), 124, dtype=torch.uint8)
    expected = (124 / 255 - 0.485) / 0.229
    assert normalise(images).shape == (1, 3, 2, 2)
    assert normalise(images)[0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge"])
def test_every_size_is_a_timm_model_of_the_same_shape(size: str) -> None:
    config = Model(size=size)  # pyright: ignore[reportArgumentType]
    name, arguments = timm_arguments(config)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **arguments)
    assert model.embed_dim == config.shape.width
    assert len(model.blocks) == config.shape.depth
    assert model.patch_embed.num_patches == config.grid.cells
    assert model.norm.eps == 1e-6


@pytest.mark.shares
def test_a_vit_bs_first_loss_is_the_references() -> None:
    """About 6.04 and not ln 196: Xavier gives the head's logits a spread (DESIGN, section 2)."""
    torch.manual_seed(0)
    method = Method(sigma=0, attentive=False)
    model = DropPos(Model(), method)
    drawn = masks(method, images=16, config=Model())
    with torch.no_grad():
        logits = model(torch.randn(16, 3, 224, 224), drawn).logits
    assert F.cross_entropy(logits.flatten(0, 1), drawn.asked.flatten()).item() == pytest.approx(
        6.04, abs=0.15
    )
