"""Pixels as an image processor of transformers makes them, in two parts: sizes once, numbers for every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from overhaul.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

AT_ONCE = 512
"""Images that a processor is given at a time."""


def sized(images_NHWC: NDArray[np.uint8], processor: Any, channels: int) -> NDArray[np.uint8]:
    """Images as the model will see them, but for scale: resized, cropped, with the channels that it has.

    Args:
        images_NHWC: with one channel or three.
        processor: of the model.
        channels: of the model. Grey images become three equal channels where it has three.

    Returns:
        `(N, C, H, W)`, still whole numbers from 0 to 255.

    Raises:
        UserError: the images have colours and the model has one channel.
    """
    there = images_NHWC.shape[-1]
    if there == 3 and channels == 1:
        raise UserError("the images have colours, and the model reads grey ones", allowed="a model of 3 channels")
    if there not in (1, channels):
        raise UserError(f"the images have {there} channels, and the model reads {channels}")
    if images_NHWC.shape[1:3] != _wanted(processor):
        parts = [images_NHWC[at : at + AT_ONCE] for at in range(0, len(images_NHWC), AT_ONCE)]
        images_NHWC = np.concatenate([_resized(part, processor) for part in parts])
    images_NCHW = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
    return np.repeat(images_NCHW, channels, axis=1) if there < channels else images_NCHW


def _wanted(processor: Any) -> tuple[int, int] | None:
    """Height and width that the processor leaves as they are; None where that depends on more."""
    if getattr(processor, "do_center_crop", False):
        return None
    if not getattr(processor, "do_resize", False):
        return None
    size = processor.size
    return (size["height"], size["width"]) if "height" in size and "width" in size else None


def _resized(images_NHWC: NDArray[np.uint8], processor: Any) -> NDArray[np.uint8]:
    as_bytes = {"do_rescale": False, "do_normalize": False, "do_convert_rgb": False}  # `sized` sees to the channels
    made = processor(list(images_NHWC), input_data_format="channels_last", return_tensors="np", **as_bytes)
    return np.asarray(made["pixel_values"]).round().astype(np.uint8).transpose(0, 2, 3, 1)


def normalized(images_NCHW: NDArray[np.uint8], processor: Any) -> Tensor:
    """`pixel_values` `(N, C, H, W)` float32: scaled and normalised as the processor says."""
    pixels = torch.from_numpy(images_NCHW).float()
    if processor.do_rescale:
        pixels *= processor.rescale_factor
    if processor.do_normalize:
        mean, std = (torch.tensor(numbers).float() for numbers in (processor.image_mean, processor.image_std))
        pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    return pixels
