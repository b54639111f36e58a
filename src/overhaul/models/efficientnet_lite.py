"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation and with ReLU6, for hardware of 8-bit integers.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019 (arXiv:1905.11946); the
lite form is that of TensorFlow's `tpu/models/official/efficientnet/lite`, with its padding.

This file lies beside the weights of every such model, as the code with which transformers reads them: it imports torch
and transformers only. Shapes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class EfficientNetLiteConfig(PreTrainedConfig):
    """The shape of an EfficientNet-Lite; by default Lite0.

    Attributes:
        image_size: that it was trained on; images of other sizes are read too.
        num_channels: of the images.
        stem_channels: of the first convolution.
        stages: (blocks, kernel, stride of the first block, expansion, channels) of each.
        head_channels: of the last convolution: how many features the classifier reads.
        dropout: on the features.
        drop_path: probability that an image skips a block: it rises linearly from 0 at the first, as if one more
            block followed the last.
        norm_eps: added to the variances of batch normalization.
        norm_momentum: of its running statistics: the share of a batch.
    """

    model_type = "efficientnet_lite"

    image_size: int = 224
    num_channels: int = 3
    stem_channels: int = 32
    stages: list[list[int]] | tuple[tuple[int, ...], ...] = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    head_channels: int = 1280
    dropout: float = 0.2
    drop_path: float = 0.2
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "same": H / stride pixels remain, and an odd pixel goes right and below."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for side, kernel, stride in zip(input.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


class DropPath(nn.Module):
    """While training, leaves a branch out for some images and scales it up for the others."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return branch
        kept = 1 - self.probability
        mask = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(kept)
        return branch * mask / kept


class EfficientNetLiteBlock(nn.Module):
    """An inverted bottleneck: channels are expanded, convolved one by one, and projected; shapes allowing, a residual.

    An expansion of 1 is left out.
    """

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int,
        expansion: int,
        drop_path: float,
    ):
        super().__init__()
        inner = inputs * expansion
        self.expands = expansion != 1
        if self.expands:
            self.expand = nn.Conv2d(inputs, inner, 1, bias=False)
            self.expand_norm = _norm(inner, config)
        self.depthwise = SameConv2d(inner, inner, kernel, stride=stride, groups=inner, bias=False)
        self.depthwise_norm = _norm(inner, config)
        self.project = nn.Conv2d(inner, outputs, 1, bias=False)
        self.project_norm = _norm(outputs, config)
        self.is_residual = stride == 1 and inputs == outputs
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        branch = x_BCHW
        if self.expands:
            branch = F.relu6(self.expand_norm(self.expand(branch)))
        branch = F.relu6(self.depthwise_norm(self.depthwise(branch)))
        branch = self.project_norm(self.project(branch))
        return x_BCHW + self.drop_path(branch) if self.is_residual else branch


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """An EfficientNet-Lite with one linear layer that tells classes apart."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.stem = SameConv2d(config.num_channels, config.stem_channels, 3, stride=2, bias=False)
        self.stem_norm = _norm(config.stem_channels, config)
        self.blocks = nn.ModuleList()
        there, total = config.stem_channels, sum(stage[0] for stage in config.stages)
        for repeats, kernel, stride, expansion, channels in config.stages:
            for repeat in range(repeats):
                drop_path = config.drop_path * len(self.blocks) / total
                shape = {"kernel": kernel, "stride": 1 if repeat else stride, "expansion": expansion}
                self.blocks.append(EfficientNetLiteBlock(config, there, channels, **shape, drop_path=drop_path))
                there = channels
        self.head = nn.Conv2d(there, config.head_channels, 1, bias=False)
        self.head_norm = _norm(config.head_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.head_channels, self.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        """Logits of the classes.

        Args:
            pixel_values: `(B, C, H, W)`.
            labels: `(B,)`, places of the classes; with them the loss is the mean cross-entropy.
        """
        x_BCHW = F.relu6(self.stem_norm(self.stem(pixel_values)))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        x_BCHW = F.relu6(self.head_norm(self.head(x_BCHW)))
        logits = self.classifier(self.dropout(x_BCHW.mean(dim=(2, 3))))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            # The variance is 2 over how many outputs an input reaches; torch's own count of them ignores groups.
            reached = module.out_channels // module.groups * module.weight[0, 0].numel()
            nn.init.normal_(module.weight, std=(2 / reached) ** 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -(module.out_features**-0.5), module.out_features**-0.5)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)


def _norm(channels: int, config: EfficientNetLiteConfig) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=config.norm_eps, momentum=config.norm_momentum)
