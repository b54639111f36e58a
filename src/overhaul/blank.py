"""Image classifiers with random weights, as directories: what a first training begins with.

Plain transformers reads them; of shapes that it does not have, the code lies beside the weights (see
`overhaul.models`). Pixels are normalised by the images that the model is made for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overhaul.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from overhaul.images import ImageSet


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape by name.

    Attributes:
        what: it is, in a few words.
        config: (channels, size, number of classes) -> a configuration of transformers; size is (height, width).
    """

    what: str
    config: Callable[[int, tuple[int, int], int], Any]


def _resnet(**shape: Any) -> Callable[[int, tuple[int, int], int], Any]:
    def config(channels: int, size: tuple[int, int], classes: int) -> Any:
        from transformers import ResNetConfig

        return _of_classes(ResNetConfig(num_channels=channels, **shape), classes)

    return config


def _vit(channels: int, size: tuple[int, int], classes: int) -> Any:
    from transformers import ViTConfig

    made = ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=size[0],
        patch_size=max(1, size[0] // 7), num_channels=channels,
    )  # fmt: skip
    return _of_classes(made, classes)


def _cct(**shape: Any) -> Callable[[int, tuple[int, int], int], Any]:
    def config(channels: int, size: tuple[int, int], classes: int) -> Any:
        from overhaul import models
        from overhaul.models.cct import CctConfig

        models.register(CctConfig.model_type)
        return _of_classes(CctConfig(num_channels=channels, image_size=list(size), **shape), classes)

    return config


_SMALL: dict[str, Any] = {"num_attention_heads": 2, "hidden_size": 128, "mlp_ratio": 1.0, "num_conv_layers": 2}


def _of_classes(config: Any, classes: int) -> Any:
    config.num_labels = classes
    return config


SHAPES = {
    "cnn": Shape(
        "two residual blocks, 32 and 64 channels, for small images",
        _resnet(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic"),
    ),
    "resnet18": Shape(
        "ResNet-18", _resnet(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2] * 4, layer_type="basic")
    ),
    "resnet50": Shape("ResNet-50", _resnet()),
    "vit": Shape("a vision transformer of four layers, 128 wide, in seven by seven patches", _vit),
    "cct2": Shape(
        "CCT-2/3x2, a compact convolutional transformer of two layers, 128 wide", _cct(num_hidden_layers=2, **_SMALL)
    ),
    "cct4": Shape("CCT-4/3x2, of four layers, 128 wide", _cct(num_hidden_layers=4, **_SMALL)),
    "cct6": Shape("CCT-6/3x1, of six layers, 256 wide", _cct(num_hidden_layers=6)),
    "cct7": Shape("CCT-7/3x1, of seven layers, 256 wide", _cct(num_hidden_layers=7)),
}


def write(shape: str, images: ImageSet, out: Path, *, seed: int = 0) -> int:
    """Writes a directory with random weights, an image processor, and a row of the head for each class.

    Args:
        shape: one of `SHAPES`.
        images: what it is for: their size, channels and classes, and the mean and spread of their pixels.
        out: a new directory.
        seed: of the weights.

    Returns:
        How many parameters the model has.

    Raises:
        UserError: there is no such shape, or it does not take images of this size.
    """
    import torch
    from transformers import AutoModelForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    from transformers.utils import logging

    from overhaul.artifact import check_out, stage
    from overhaul.interop.classifier import name_classes

    if shape not in SHAPES:
        raise UserError(f"there is no shape {shape!r}", allowed=", ".join(SHAPES), hint=did_you_mean(shape, SHAPES))
    height, width, channels = images.train.images_NHWC.shape[1:]
    if shape == "vit" and (height != width or height % max(1, height // 7)):
        raise UserError(f"vit takes square images, in patches of a seventh; these are {height} x {width}", hint="cnn")
    check_out(out)
    torch.manual_seed(seed)
    config = SHAPES[shape].config(channels, (height, width), len(images.classes))
    model = AutoModelForImageClassification.from_config(config)
    name_classes(model, images.classes)
    mean_C, std_C = _normal(images)
    processor = ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=mean_C, image_std=std_C)
    logging.disable_progress_bar()
    with stage(out) as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def _normal(images: ImageSet) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the training images, between 0 and 1."""
    import numpy as np

    pixels = images.train.images_NHWC
    mean_C = pixels.mean(axis=(0, 1, 2), dtype=np.float64) / 255
    square_C = np.square(pixels, dtype=np.float64).mean(axis=(0, 1, 2)) / 255**2
    std_C = np.sqrt(np.maximum(square_C - mean_C**2, 1e-6))
    return [round(float(m), 4) for m in mean_C], [round(float(s), 4) for s in std_C]
