"""BCT on what its paper studied: an encoder that classifies, with LayerNorm, GELU and attention in both directions.

There is no BERT here. The encoder is trained on the spot on digits, drawn in the fonts that matplotlib brings, shifted,
turned and noisy; it sees them as 16 patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.bct.blocks import encode, snap
from overhaul.bct.layers import BlockLinear
from overhaul.bct.norm import layer_norm
from overhaul.bct.product import float_product
from overhaul.bct.scheme import Scheme
from overhaul.bct.softmax import softmax
from overhaul.bct.tables import table_of
from overhaul.layers import swap

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = (0, 1, 2)
NUM_TRAINED, NUM_TESTED, STEPS, BATCH_SIZE = 4000, 4000, 1000, 64
WIDTH, HEADS, LAYERS, PATCH, SIDE, CLASSES = 64, 4, 2, 4, 16, 10
SETTINGS = {
    "trained": NUM_TRAINED, "tested": NUM_TESTED, "steps": STEPS, "width": WIDTH, "layers": LAYERS, "heads": HEADS,
    "activation_block": 16, "block": "1x64",
}  # fmt: skip


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Patches (count, 16, 16) and classes (count,)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(seed)
    files = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf"))
    files = [file for file in files if "Display" not in file.name]
    fonts = [[ImageFont.truetype(str(file), size) for size in range(40, 50, 2)] for file in files]
    images, classes = [], random.integers(0, CLASSES, count)
    for digit in classes:
        image = Image.new("L", (4 * SIDE, 4 * SIDE))
        font = fonts[random.integers(len(fonts))][random.integers(5)]
        place = tuple(random.integers(9, 17, 2).tolist())
        ImageDraw.Draw(image).text(place, str(digit), fill=255, font=font)
        turned = image.rotate(random.uniform(-10, 10)).resize((SIDE, SIDE), Image.Resampling.BOX)
        images.append(np.asarray(turned, dtype=np.float32) / 255)
    pixels = torch.from_numpy(np.stack(images) + random.normal(0, 0.2, (count, SIDE, SIDE)).astype(np.float32))
    patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(count, -1, PATCH * PATCH)
    return patches, torch.from_numpy(classes)


class Layer(nn.Module):
    """Norm, attention, add, norm, MLP, add; with a scheme, on 8-bit blocks."""

    scheme: Scheme | None = None

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = stored(x_BTD + self.attend(normed(self.norms[0], x_BTD, self.scheme)), self.scheme)
        opened = self.up(normed(self.norms[1], x_BTD, self.scheme))
        opened = table_of("gelu")(opened, self.scheme.activation_block) if self.scheme else F.gelu(opened)
        return stored(x_BTD + self.down(opened), self.scheme)

    def attend(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (layer(x_BTD).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = float_product(q, k) * (WIDTH // HEADS) ** -0.5
        p = softmax(scores, None, self.scheme) if self.scheme else scores.softmax(-1)
        return self.out(float_product(p, v.transpose(-1, -2)).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Patches to classes."""

    scheme: Scheme | None = None

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(PATCH * PATCH, WIDTH), nn.Parameter(torch.randn(16, WIDTH) * 0.02)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, patches_BTP: Tensor) -> Tensor:
        x_BTD = self.layers(stored(self.embed(patches_BTP) + self.place, self.scheme))
        return self.head(stored(normed(self.norm, x_BTD, self.scheme).mean(1), self.scheme))


def stored(x: Tensor, scheme: Scheme | None) -> Tensor:
    return snap(x, scheme.activation_block) if scheme else x


def normed(norm: Any, x: Tensor, scheme: Scheme | None) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps, scheme.activation_block) if scheme else norm(x)


def trained(seed: int) -> Encoder:
    torch.manual_seed(seed)
    encoder, (patches, classes) = Encoder(), digits(NUM_TRAINED, seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(0, NUM_TRAINED, (BATCH_SIZE,))
        optimizer.zero_grad()
        F.cross_entropy(encoder(patches[rows]), classes[rows]).backward()
        optimizer.step()
        schedule.step()
    return encoder.eval()


def compressed(encoder: Encoder, mode: str) -> Encoder:
    """The encoder itself, from now on computed on blocks: every linear layer, and all between them."""
    scheme = Scheme.model_validate({"mode": mode, "activation_block": SETTINGS["activation_block"]})

    def block_linear(old: nn.Linear) -> BlockLinear:
        layer = BlockLinear(old.in_features, old.out_features, old.bias, scheme.bits, scheme)
        layer.fill(encode(old.weight, layer.block, scheme.bits))
        return layer

    swap(encoder, [name for name, module in encoder.named_modules() if type(module) is nn.Linear], block_linear)
    for module in (encoder, *encoder.layers):
        module.scheme = scheme
    return encoder


@torch.no_grad()
def accuracy(encoder: Encoder, seed: int) -> float:
    patches, classes = digits(NUM_TESTED, 1000 + seed)
    return float((encoder(patches).argmax(-1) == classes).double().mean())


@pytest.fixture(scope="module")
def accuracies() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"fp32": [], "w8a8": [], "w4a8": []}
    for seed in SEEDS:
        encoder = trained(seed)
        found["fp32"].append(accuracy(encoder, seed))
        state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        for mode in ("w8a8", "w4a8"):
            copy = Encoder()
            copy.load_state_dict(state)
            with torch.no_grad():
                found[mode].append(accuracy(compressed(copy.eval(), mode), seed))
    results.record(
        _row(id=f"encoder-{name}", what=f"Accuracy of an encoder on drawn digits, {name}", values=tuple(values))
        for name, values in found.items()
    )
    return found


@pytest.mark.parametrize(("mode", "points"), [("w8a8", 0.009), ("w4a8", 0.03)])
def test_accuracy_stays_within_the_papers_loss(accuracies, mode, points):
    assert min(accuracies["fp32"]) > 0.9, "an encoder that has learnt nothing cannot lose anything"
    lost = tuple(dense - ours for dense, ours in zip(accuracies["fp32"], accuracies[mode], strict=True))

    results.hold(
        _row(
            id=f"encoder-{mode}-lost", what=f"Accuracy that the encoder loses in {mode}", values=lost,
            target=Target("<=", points),
        )
    )  # fmt: skip


def _row(*, id: str, **fields: Any) -> Row:
    common = {"kind": "claim", "seeds": SEEDS, "settings": SETTINGS, "unit": "share"}
    return Row(**{**common, "id": f"quantize-bct/{id}", **fields})
