"""Time a training step beside a plain implementation of the same arithmetic.

    python -m tests.benchmarks.step [--quick] [--rounds 3]

The plain step is what one writes first: eager, a whole second pass for the attentive weights,
logits of every visible patch, AdamW without its fused kernel. It starts from the same weights and
sees the same masks, and both losses of the first step must agree. Steps of all contenders are
taken in turn, and the ratio is the median of the rounds' own ratios, so that a machine that others
use too disturbs both sides alike.

The last line is of a ViT-B with attentive weights: vs_plain with both in float32, vs_plain_bf16
with our step in bf16 (nan where the device has no units for it), mfu the share of the measured
peak of a matrix product that the float32 step's own operations reach (bf16's on a GPU).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from droppos.config import Compute, Method, Model, Optim
from droppos.flops import matmul_peak, step_flops
from droppos.masking import draw
from droppos.model import IMAGENET_MEAN, IMAGENET_STD, DropPos
from droppos.parallel import has_bf16_units, unwrap
from droppos.schedule import learning_rate, parameter_groups, sigma
from droppos.step import MicroBatch, TrainState, step_noise, train_step
from droppos.targets import smoothed_targets

TOLERANCE = 2e-4
"""Largest difference of two first losses in float32."""
TINY = Model(image_size=(32, 32), patch_size=8, width=48, depth=2, heads=4)


class Setting(NamedTuple):
    """What is timed."""

    name: str
    model: Model
    attentive: bool
    batch: int
    """Images of a step."""
    precision: str = "float32"
    compiled: bool = False

    @property
    def method(self) -> Method:
        return Method(attentive=self.attentive)


class Timing(NamedTuple):
    """Medians over rounds."""

    seconds: float
    """Of one of our steps."""
    ratio: float
    """A plain float32 step's time over that of ours."""
    memory: int
    """Most bytes our step had on the GPU; 0 on a CPU."""


class Plain:
    """The same method, straightforward."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.model = DropPos(state.model_config, state.method).to(state.device)
        self.model.load_state_dict(unwrap(state.model).state_dict())
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, state.optim.weight_decay),
            lr=state.optim.peak_lr,
            betas=state.optim.betas,
            foreach=False,
            fused=False,
        )

    def train_step(self, batch: MicroBatch) -> Tensor:
        """Take the step that our side takes next, and give its loss."""
        state, method, epoch = self.state, self.state.method, self.state.epoch
        masks = draw(method.counts(self.model.grid), method, step_noise(state))
        images = _normalised(batch.images.to(state.device))

        logits = self._logits(images, masks.visible, masks.dropped)[masks.dropped]
        true = masks.visible[masks.dropped]
        width = sigma(method, epoch, state.optim.epochs)
        targets = smoothed_targets(self.model.grid, width).to(state.device)[true]
        nats = F.cross_entropy(logits, targets, reduction="none").view(len(images), -1)
        weights = torch.full_like(nats, 1 / nats.shape[1])
        if method.attentive:
            similarity = self._similarity(images).gather(1, masks.visible)
            scored = similarity[masks.dropped].view_as(nats)
            weights = (scored / method.tau).softmax(dim=1)
        loss = (weights * nats).sum(dim=1).mean()

        self.optimizer.zero_grad()
        loss.backward()
        assert state.optim.clip_norm is not None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), state.optim.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(state.optim, epoch)
        self.optimizer.step()
        return loss.detach()

    def _logits(self, images: Tensor, visible: Tensor, dropped: Tensor) -> Tensor:
        encoder, decoder = self.model.encoder, self.model.position_decoder
        assert decoder is not None and encoder.pos_embed is not None
        patches = encoder.patch_embed(images)
        index = visible[..., None].expand(-1, -1, patches.shape[-1])
        places = encoder.pos_embed[:, 1:].expand_as(patches).gather(1, index)
        places = torch.where(dropped[..., None], self.model.dropped_token, places)
        tokens = self._encoded(patches.gather(1, index) + places)
        return decoder.head(decoder.norm(_through(decoder.blocks, decoder.embed(tokens))))[:, 1:]

    @torch.no_grad()
    def _similarity(self, images: Tensor) -> Tensor:
        encoder = self.model.encoder
        assert encoder.pos_embed is not None
        tokens = self._encoded(encoder.patch_embed(images) + encoder.pos_embed[:, 1:])
        return F.cosine_similarity(tokens[:, 1:], tokens[:, :1], dim=-1)

    def _encoded(self, patches: Tensor) -> Tensor:
        encoder = self.model.encoder
        assert encoder.pos_embed is not None and encoder.cls_token is not None
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(patches), -1, -1)
        return encoder.norm(_through(encoder.blocks, torch.cat([first, patches], dim=1)))


def _through(blocks: torch.nn.Module, tokens: Tensor) -> Tensor:
    for block in blocks.children():
        tokens = block(tokens)
    return tokens


def _normalised(images: Tensor) -> Tensor:
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def create(setting: Setting, device: torch.device) -> TrainState:
    """Make our side of a setting; its float32 guide is exact, as the plain one is."""
    compute = Compute(
        strategy="single",
        precision=setting.precision,  # pyright: ignore[reportArgumentType]
        guide_precision="same",
        device=device.type,  # pyright: ignore[reportArgumentType]
        compile=setting.compiled,
    )
    optim = Optim(epochs=10, warmup_epochs=1, global_batch=setting.batch)
    return TrainState.create(
        setting.model, setting.method, optim, compute, seed=0, steps_per_epoch=100
    )


def pictures(setting: Setting) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, *setting.model.image_size, 3)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return MicroBatch(images, torch.arange(setting.batch))


def timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(setting: Setting, device: torch.device, rounds: int) -> Timing:
    """Take steps of both sides in turn.

    Raises:
        AssertionError: If the first losses of both, in float32, do not agree.
    """
    state, batch = create(setting, device), pictures(setting)
    plain = Plain(state)
    theirs, ours = plain.train_step(batch).item(), train_step(state, [batch]).metrics.loss.item()
    if setting.precision == "float32":
        assert abs(ours - theirs) < TOLERANCE, f"{setting.name}: loss {ours}, plain {theirs}"
    seconds, ratios, memory = [], [], 0
    for _ in range(rounds):
        other = timed(device, lambda: plain.train_step(batch))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds.append(timed(device, lambda: train_step(state, [batch])))
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        ratios.append(other / seconds[-1])
    return Timing(statistics.median(seconds), statistics.median(ratios), memory)


def settings(device: torch.device, quick: bool) -> list[Setting]:
    """List what is worth timing here; the first is the ViT-B of the last line, in float32."""
    base, small = ("tiny", TINY) if quick else ("ViT-B", Model()), ("ViT-S", Model(size="small"))
    sizes, batch = [base] if quick else [base, small], 8
    found = [Setting(*size, attentive, batch) for size in sizes for attentive in (True, False)]
    if quick or has_bf16_units(device):
        found += [setting._replace(precision="bf16") for setting in found]
    if device.type == "cuda" and not quick:
        half = Setting(*base, True, batch, "bf16")
        found += [half._replace(batch=many) for many in (32, 64, 128, 256)]
        found += [half._replace(batch=256, compiled=True)]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model: test the benchmark")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = {"float32": matmul_peak(device, torch.float32)}
    if options.quick or has_bf16_units(device):
        peaks["bf16"] = matmul_peak(device, torch.bfloat16)
    table = Table(
        "model", "attentive", "batch", "precision", "compiled", "s/step", "vs plain", "MFU", "GiB"
    )
    found: dict[Setting, tuple[Timing, float]] = {}
    for setting in settings(device, options.quick):
        timing = measure(setting, device, options.rounds)
        flops = step_flops(setting.model, setting.method) * setting.batch
        mfu = flops / timing.seconds / peaks[setting.precision]
        found[setting] = (timing, mfu)
        cells = [setting.name, setting.attentive, setting.batch, setting.precision]
        cells += [setting.compiled, f"{timing.seconds:.4g}", f"{timing.ratio:.2f}", f"{mfu:.2f}"]
        table.add_row(*map(str, cells), f"{timing.memory / 2**30:.1f}")
    Console(width=100).print(table)
    print("peak TFLOP/s:", ", ".join(f"{name} {peak / 1e12:.3g}" for name, peak in peaks.items()))
    first = next(iter(found))
    half = found.get(first._replace(precision="bf16"))
    used = half if half and device.type == "cuda" else found[first]
    print(
        f"step device={device.type} vs_plain={found[first][0].ratio:.2f} "
        f"vs_plain_bf16={half[0].ratio if half else float('nan'):.2f} mfu={used[1]:.2f}"
    )


if __name__ == "__main__":
    main()
