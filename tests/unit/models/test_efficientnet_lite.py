"""EfficientNet-Lite: its published size, TensorFlow's padding, residuals, and features that the head reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from overhaul.interop.classifier import PENULTIMATE, classified, head_of, set_classes
from overhaul.models.efficientnet_lite import (
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    SameConv2d,
)


def small(**fields: Any) -> EfficientNetLiteForImageClassification:
    torch.manual_seed(0)
    stages = [[1, 3, 1, 1, 8], [2, 5, 2, 2, 12]]
    config = EfficientNetLiteConfig(
        stem_channels=8, stages=stages, head_channels=20, id2label={0: "cat", 1: "dog", 2: "owl"}, **fields
    )
    return EfficientNetLiteForImageClassification(config).eval()


def test_it_has_as_many_parameters_as_lite0():
    """4.7 million (the table of tpu/models/official/efficientnet/lite), counted from its layers."""
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))

    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    assert len(model.blocks) == 16
    assert [block.drop_path.probability for block in model.blocks] == [0.2 * place / 16 for place in range(16)]


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 2)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_padding_is_that_of_tensorflow(size: tuple[int, int], kernel: int, stride: int):
    """Of tf.nn: `ceil(in / stride)` pixels remain, what is missing stands half before and half, or more, behind."""
    layer = SameConv2d(2, 3, kernel, stride=stride)
    images = torch.randn(1, 2, *size)

    found = layer(images)

    padded = images
    for axis in (2, 3):
        remain = (padded.shape[axis] + stride - 1) // stride
        missing = max((remain - 1) * stride + kernel - padded.shape[axis], 0)
        before = padded.new_zeros([missing // 2 if at == axis else n for at, n in enumerate(padded.shape)])
        behind = padded.new_zeros([missing - missing // 2 if at == axis else n for at, n in enumerate(padded.shape)])
        padded = torch.cat([before, padded, behind], dim=axis)
    assert torch.equal(found, F.conv2d(padded, layer.weight, layer.bias, stride))
    assert found.shape[2:] == tuple(-(-side // stride) for side in size)


def test_a_block_is_the_one_written_out():
    model, images = small(), torch.randn(2, 3, 13, 10)
    first, widening, last = model.blocks
    with torch.no_grad():
        x = F.relu6(model.stem_norm(model.stem(images)))
        for block, residual in ((first, True), (widening, False), (last, True)):
            branch = F.relu6(block.expand_norm(block.expand(x))) if block is not first else x
            branch = block.project_norm(block.project(F.relu6(block.depthwise_norm(block.depthwise(branch)))))
            x = x + branch if residual else branch
        features_BD = F.relu6(model.head_norm(model.head(x))).flatten(2).mean(-1)
        found = classified(model, {"pixel_values": images}, (PENULTIMATE,))

    torch.testing.assert_close(found.features[PENULTIMATE], features_BD)
    torch.testing.assert_close(found.logits, model.classifier(features_BD))


def test_a_fresh_convolution_keeps_the_variance_of_what_passes_backwards():
    """Of 2 over how many outputs an input reaches: k * k for a convolution of each channel by itself."""
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=10))

    for layer in (model.head, model.blocks[12].depthwise, model.blocks[12].expand):
        reached = layer.out_channels // layer.groups * layer.kernel_size[0] ** 2
        assert float(layer.weight.detach().std()) == pytest.approx((2 / reached) ** 0.5, rel=0.05)


def test_the_head_is_found_and_grows_with_the_classes():
    model = small()
    name, before = head_of(model)
    rows = before.weight.detach().clone()

    gone = set_classes(model, ("owl", "fox", "cat", "elk"))

    assert name == "classifier"
    assert gone == ("dog",)
    after: nn.Linear = head_of(model)[1]
    assert torch.equal(after.weight[[0, 2]], rows[[2, 0]])
    assert model(torch.zeros(1, 3, 8, 8), labels=torch.tensor([3])).loss.isfinite()
