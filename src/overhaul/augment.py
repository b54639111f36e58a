"""Images as they might have looked as well: moved, turned, lit otherwise, noisy. The same seed makes the same ones.

Every image is changed in a way of its own; a policy says how far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from overhaul.interop.pixels import normalized
from overhaul.machine import derived_seed
from overhaul.reservoir import with_offered
from overhaul.stream import Stream

Named = Literal["auto", "noise", "grey", "colour"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How far images are changed at most; each is changed by as much in a direction of chance.

    Attributes:
        shift: along each side, as a share of it; what comes in is what the border shows.
        turn: about the centre, in degrees.
        flip: whether half of the images are mirrored, left to right.
        brightness: factor of all pixels, above or below 1.
        contrast: factor of each pixel's distance from its image's mean.
        saturation: factor of each pixel's distance from its own grey, of images in colour.
        noise: standard deviation of what is added to each value, as a share of 255.
    """

    shift: float = 0.0
    turn: float = 0.0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    noise: float = 0.0


POLICIES: dict[str, Policy] = {
    "noise": Policy(noise=0.05),
    "grey": Policy(shift=0.07, turn=10, brightness=0.2, contrast=0.2, noise=0.05),
    "colour": Policy(shift=0.1, turn=15, flip=True, brightness=0.3, contrast=0.3, saturation=0.3),
}
"""By name: noise alone; what leaves a grey image what it is, as a digit mirrored is none; what a photograph stands."""


def policy(name: Named, channels: int) -> Policy:
    """A policy by name; `auto` is noise alone for grey images and `colour` for others, which is how ConTraCon divides.

    Args:
        name: of it.
        channels: of the images.
    """
    return POLICIES[("noise" if channels == 1 else "colour") if name == "auto" else name]


def augmented(images_NCHW: Tensor, how: Policy, *, seed: int) -> Tensor:
    """The images changed, in their type: uint8 from 0 to 255, or floats of the same range, which are not rounded.

    Args:
        images_NCHW: from 0 to 255.
        how: far.
        seed: of all that is drawn; it does not depend on what the policy leaves out.
    """
    dice = torch.Generator().manual_seed(seed)
    count = len(images_NCHW)
    draws_DN = torch.rand((7, count), generator=dice) * 2 - 1
    noise_NCHW = torch.randn(images_NCHW.shape, generator=dice)
    made = images_NCHW.float()
    if how.shift or how.turn or how.flip:
        made = _moved(made, how, draws_DN[:4])
    for channel_mean, most, draw_N in (
        (None, how.brightness, draws_DN[4]),
        ((1, 2, 3), how.contrast, draws_DN[5]),
        ((1,), how.saturation, draws_DN[6]),
    ):
        if most:
            middle = made.mean(dim=channel_mean, keepdim=True) if channel_mean else torch.zeros(())
            made = middle + (1 + most * draw_N)[:, None, None, None] * (made - middle)
    if how.noise:
        made = made + 255 * how.noise * noise_NCHW
    made = made.clamp(0, 255)
    return made.to(images_NCHW.dtype) if images_NCHW.is_floating_point() else made.round().to(images_NCHW.dtype)


def _moved(images_NCHW: Tensor, how: Policy, draws_DN: Tensor) -> Tensor:
    """Shifted, turned and mirrored, bilinear, in one go."""
    height, width = images_NCHW.shape[-2:]
    angle_N = math.radians(how.turn) * draws_DN[0]
    mirror_N = torch.where(draws_DN[1] < 0, -1.0, 1.0) if how.flip else torch.ones(len(images_NCHW))
    # Coordinates go from -1 to 1 over either side, which is why a turn of an oblong has its ratio in it.
    rows = [
        [mirror_N * angle_N.cos(), -angle_N.sin() * height / width, 2 * how.shift * draws_DN[2]],
        [mirror_N * angle_N.sin() * width / height, angle_N.cos(), 2 * how.shift * draws_DN[3]],
    ]
    theta_N23 = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = affine_grid(theta_N23, list(images_NCHW.shape), align_corners=False)
    return grid_sample(images_NCHW, grid, padding_mode="border", align_corners=False)


IMAGES = "images"
"""In a batch, images that are whole numbers from 0 to 255, `(B, C, H, W)` uint8, and not yet what a model reads."""


class Augmenting(Stream):
    """Batches as a model reads them, each of their images changed anew each time it comes; remembered ones too.

    `images` become `pixel_values`, `(B, C, H, W)` float32, and so do `memory/images` and the like. What is drawn
    depends on the seed, the batches so far and the name alone.

    Args:
        source: batches with `images`.
        how: far they are changed.
        processor: of the model.
        seed: of what is drawn.
        offers: whether a memory is offered the batches: then they come as they were read as well.
    """

    def __init__(self, source: Stream, how: Policy, *, processor: Any, seed: int, offers: bool = False) -> None:
        self.sources, self.how, self.processor, self.seed, self.offers = (source,), how, processor, seed, offers
        self.count = 0

    def __next__(self) -> dict[str, Tensor]:
        read = next(self.sources[0])
        self.count += 1
        made = dict(self._made(name, tensor) for name, tensor in read.items())
        return with_offered(made, read) if self.offers else made

    def _made(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """A tensor of a batch as the model reads it, under its name then."""
        if not name.endswith(IMAGES):
            return name, tensor
        changed = augmented(tensor, self.how, seed=derived_seed(self.seed, self.count, name))
        return f"{name.removesuffix(IMAGES)}pixel_values", normalized(changed.numpy(), self.processor)

    def own_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]

    def label(self) -> str:
        return f"augment({self.how})"
