"""Small image classifiers and sets for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

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
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(directory)
    return directory


def write_bars(path: Path, *, classes: int = 4, each: int = 30, seed: int = 0) -> Path:
    """Grey images with a bright bar, whose row is the class, in noise: learnt in a few steps."""
    dice = np.random.default_rng(seed)
    labels_N = np.repeat(np.arange(classes), each)
    images_NHWC = dice.integers(0, 90, (len(labels_N), SIZE, SIZE, 1)).astype(np.uint8)
    for place, label in enumerate(labels_N):
        images_NHWC[place, 2 * label : 2 * label + 2] += 150
    np.savez(path, images=images_NHWC, labels=labels_N)
    return path
