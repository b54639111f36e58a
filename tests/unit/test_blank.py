"""Blank classifiers: stock directories for images of a set, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from command import overhaul, refused
from images import write_bars
from overhaul import artifact, blank
from overhaul.images import open_images
from overhaul.kinds import Kind


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    return write_bars(tmp_path / "bars.npz")


@pytest.mark.parametrize("shape", ["cnn", "vit", "cct2"])
def test_a_blank_reads_the_images_that_it_was_made_for(shape: str, bars: Path, tmp_path: Path):
    done = overhaul("blank", shape, "-o", tmp_path / "out", "--images", bars)
    assert done.code == 0, done.err

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    images = open_images(bars)
    given = processor(list(images.train.images_NHWC), input_data_format="channels_last", return_tensors="pt")
    assert model(**given).logits.shape == (len(images.train), 4)
    assert tuple(model.config.id2label.values()) == images.classes
    assert abs(float(given["pixel_values"].mean())) < 0.01
    assert abs(float(given["pixel_values"].std()) - 1) < 0.01
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in done.out


def test_a_convolutional_transformer_takes_images_that_are_not_square(tmp_path: Path):
    dice = np.random.default_rng(0)
    images = dice.integers(0, 255, (20, 9, 14, 3), dtype=np.uint8)
    np.savez(tmp_path / "wide.npz", images=images, labels=np.arange(20) % 2)

    done = overhaul("blank", "cct4", "-o", tmp_path / "out", "--images", tmp_path / "wide.npz")

    assert done.code == 0, done.err
    model = artifact.load(tmp_path / "out", kinds=(Kind.IMAGE_CLASSIFIER,)).model
    assert model(pixel_values=torch.zeros(2, 3, 9, 14)).logits.shape == (2, 2)
    assert all(shape in overhaul("blank", "--help").out for shape in blank.SHAPES)


def test_the_seed_makes_the_weights(bars: Path, tmp_path: Path):
    images = open_images(bars)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        blank.write("cnn", images, tmp_path / name, seed=seed)
    one, again, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "two"))

    assert one == again != two


def test_the_shapes_are_those_that_were_published():
    """Parameters for 1,000 classes of colour pictures (He et al., 2016), as torchvision has them."""
    from transformers import AutoModelForImageClassification as Auto

    sizes = {"resnet18": 11_689_512, "resnet50": 25_557_032}
    for shape, wanted in sizes.items():
        model = Auto.from_config(blank.SHAPES[shape].config(3, (224, 224), 1000))
        assert sum(p.numel() for p in model.parameters()) == wanted


def test_what_does_not_fit_is_refused(bars: Path, tmp_path: Path):
    refused(overhaul("blank", "cnnn", "-o", tmp_path / "out", "--images", bars), "there is no shape 'cnnn'", "cnn")
    refused(overhaul("blank", "cnn", "-o", tmp_path, "--images", bars), "is not empty")
    wide = np.zeros((20, 8, 12, 1), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None]
    np.savez(tmp_path / "wide.npz", images=wide, labels=np.arange(20) % 2)
    refused(overhaul("blank", "vit", "-o", tmp_path / "out", "--images", tmp_path / "wide.npz"), "8 x 12")
    assert not (tmp_path / "out").exists()
