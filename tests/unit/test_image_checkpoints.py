"""A checkpoint under its package's names gives the same logits in the directory that is made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from overhaul import artifact
from overhaul.image_checkpoints import distinct, renamed, write_efficientnet_lite0
from overhaul.kinds import Kind
from overhaul.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification

CLASSES = [f"class {place}" for place in range(1000)]


def theirs(name: str) -> str:
    """The name of a tensor in `efficientnet-lite-pytorch` 0.1.0."""
    parts = name.split(".")
    if parts[0] == "blocks":
        inner = {"expand": "_expand_conv", "expand_norm": "_bn0", "depthwise": "_depthwise_conv",
                 "depthwise_norm": "_bn1", "project": "_project_conv", "project_norm": "_bn2"}  # fmt: skip
        return ".".join(["_blocks", parts[1], inner[parts[2]], *parts[3:]])
    outer = {"stem": "_conv_stem", "stem_norm": "_bn0", "head": "_conv_head", "head_norm": "_bn1", "classifier": "_fc"}
    return ".".join([outer[parts[0]], *parts[1:]])


def checkpoint() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model.state_dict()


def test_a_checkpoint_is_read_as_what_it_was(tmp_path: Path):
    tensors = checkpoint()
    torch.save({theirs(name): tensor for name, tensor in tensors.items()}, tmp_path / "lite0.pth")

    write_efficientnet_lite0(tmp_path / "lite0.pth", CLASSES, tmp_path / "out")

    made = artifact.load(tmp_path / "out", kinds=(Kind.IMAGE_CLASSIFIER,))
    found = made.model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert made.model.config.id2label[999] == "class 999"
    assert made.model.config.num_labels == 1000


def test_pixels_are_those_that_it_was_trained_on(tmp_path: Path):
    torch.save({theirs(name): tensor for name, tensor in checkpoint().items()}, tmp_path / "lite0.pth")
    write_efficientnet_lite0(tmp_path / "lite0.pth", CLASSES, tmp_path / "out")
    picture_HWC = np.random.default_rng(0).integers(0, 256, (300, 320, 3), dtype=np.uint8)

    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    found = processor(Image.fromarray(picture_HWC), return_tensors="np")["pixel_values"][0]

    sized = Image.fromarray(picture_HWC).resize((273, 256), Image.Resampling.BICUBIC)
    left = (273 - 224) // 2
    wanted = (np.asarray(sized, np.float64)[16:240, left : left + 224] - 127) / 128
    np.testing.assert_allclose(found, wanted.transpose(2, 0, 1), atol=1e-5)


def test_names_that_are_known_already_stay():
    tensors = {"stem.weight": torch.zeros(1), "_blocks.11._bn1.bias": torch.ones(1)}

    assert renamed(tensors) == {"stem.weight": tensors["stem.weight"], "blocks.11.depthwise_norm.bias": torch.ones(1)}


def test_every_class_has_a_name_of_its_own():
    assert distinct(["crane", "owl", "crane"]) == ["crane (0)", "owl", "crane (2)"]
