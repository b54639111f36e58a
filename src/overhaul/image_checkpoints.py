"""Checkpoints of image classifiers, as packages hold them, made into directories that transformers reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_LITE_NAMES = (
    (r"^_conv_stem\.", "stem."),
    (r"^_bn0\.", "stem_norm."),
    (r"^_conv_head\.", "head."),
    (r"^_bn1\.", "head_norm."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.", "blocks."),
    (r"\._expand_conv\.", ".expand."),
    (r"\._bn0\.", ".expand_norm."),
    (r"\._depthwise_conv\.", ".depthwise."),
    (r"\._bn1\.", ".depthwise_norm."),
    (r"\._project_conv\.", ".project."),
    (r"\._bn2\.", ".project_norm."),
)
"""Names of tensors in `efficientnet-lite-pytorch`, and here."""


def write_efficientnet_lite0(checkpoint: Path, classes: Sequence[str], directory: Path) -> None:
    """Writes the directory of an EfficientNet-Lite0 with its image processor.

    Args:
        checkpoint: a `.pth` of `efficientnet-lite-pytorch`.
        classes: their names, in the order of its logits.
        directory: a new one.
    """
    import torch
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    from overhaul import models
    from overhaul.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification

    models.register(EfficientNetLiteConfig.model_type)
    names = dict(enumerate(distinct(classes)))
    config: Any = EfficientNetLiteConfig(id2label=names, label2id={name: place for place, name in names.items()})
    model = EfficientNetLiteForImageClassification(config)
    model.load_state_dict(renamed(torch.load(checkpoint, map_location="cpu", weights_only=True)))
    model.save_pretrained(directory)
    # What TensorFlow's evaluation does: seven eighths of the shorter side, bicubic; pixels become (x - 127) / 128.
    size = config.image_size
    processor = BitImageProcessorPil(
        size={"shortest_edge": size + 32},
        crop_size={"height": size, "width": size},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    processor.save_pretrained(directory)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `efficientnet-lite-pytorch` under the names that they have in `overhaul.models.efficientnet_lite`."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in _LITE_NAMES:
            name = re.sub(theirs, ours, name)
        found[name] = tensor
    return found


def distinct(names: Sequence[str]) -> list[str]:
    """Names of classes with each that occurs more than once followed by its place."""
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({place})" for place, name in enumerate(names)]
