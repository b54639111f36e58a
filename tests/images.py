"""Small image classifiers and sets for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from overhaul import models

SIZE = 8


def write_cnn(directory: Path, *, classes: int = 2, seed: int = 0) -> Path:
    """A convolutional network of two stages with random weights, for grey images of 8 x 8."""
    torch.manual_seed(seed)
    names = {place: str(place) for place in range(classes)}
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=classes,
        id2label=names, label2id={name: place for place, name in names.items()},
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(directory)
    _write_processor(directory)
    return directory


def write_vit(directory: Path, *, classes: int = 2, dtype: str = "float32") -> Path:
    """A vision transformer of two layers, without batch statistics."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE, patch_size=2,
        num_channels=1, num_labels=classes, id2label=dict(enumerate(map(str, range(classes)))),
    )  # fmt: skip
    ViTForImageClassification(config).to(getattr(torch, dtype)).save_pretrained(directory)
    _write_processor(directory)
    return directory


def write_own(directory: Path, architecture: str, *, classes: int = 2, channels: int = 1) -> Path:
    """A small classifier of an architecture whose code lies beside its weights."""
    models.register(architecture)
    sizes: dict[str, dict[str, Any]] = {
        "cct": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE},
        "efficientnet_lite": {"stem_channels": 8, "stages": [[1, 3, 1, 1, 8], [2, 3, 2, 2, 12]], "head_channels": 16},
    }
    configuration, classifier = models.classes(architecture)
    names = dict(enumerate(map(str, range(classes))))
    config = configuration(num_channels=channels, id2label=names, **sizes[architecture])
    config.label2id = {name: place for place, name in names.items()}
    torch.manual_seed(0)
    classifier(config).save_pretrained(directory)
    _write_processor(directory)
    return directory


def _write_processor(directory: Path) -> None:
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(directory)


def write_bars(path: Path, *, classes: int = 4, each: int = 30, seed: int = 0) -> Path:
    """Grey images with a bright bar, whose row is the class, in noise: learnt in a few steps."""
    dice = np.random.default_rng(seed)
    labels_N = np.repeat(np.arange(classes), each)
    images_NHWC = dice.integers(0, 90, (len(labels_N), SIZE, SIZE, 1)).astype(np.uint8)
    for place, label in enumerate(labels_N):
        images_NHWC[place, 2 * label : 2 * label + 2] += 150
    np.savez(path, images=images_NHWC, labels=labels_N)
    return path
