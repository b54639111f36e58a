"""A frozen linear layer whose output channels are each mapped once more: CLR (Ge et al., 2023) for language models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from overhaul.layers import to_linear


class Reading:
    """What all layers of a model need to know of the batch that it reads.

    Attributes:
        mask_BT: 1 at tokens, 0 where a text was filled up; None where no text was.
    """

    def __init__(self) -> None:
        self.mask_BT: Tensor | None = None


class ChannelMapped(nn.Module):
    """Channel c of `y = W x + b` becomes `sum_j k_cj y_c(t - K + 1 + j)`, a kernel over time that never looks ahead.

    Before a text there are zeros, and so there are where it was filled up. With K = 1 each channel is scaled.

    Args:
        linear: the frozen layer.
        reading: what is filled up in a batch, which all layers of a model share.
        kernel: K, tokens that a kernel spans, the present one included.

    Raises:
        ValueError: no kernel is as short.
    """

    kernel: nn.Parameter

    def __init__(self, linear: nn.Linear, reading: Reading, *, kernel: int = 1) -> None:
        super().__init__()
        if kernel < 1:
            raise ValueError(f"a kernel over {kernel} tokens")
        self.linear, self.reading, self.kernel_size = linear, reading, kernel
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, tensor in self.begin().items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, at which some models look for its precision."""
        return self.linear.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The frozen bias."""
        return self.linear.bias

    def begin(self) -> dict[str, Tensor]:
        """The tensors with which the layer computes what the linear one does, to the bit, by name."""
        kernel_OK = self.linear.weight.new_zeros((self.out_features, self.kernel_size))
        kernel_OK[:, -1] = 1.0
        return {"kernel": kernel_OK}

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Maps `(B, T, I)` to `(B, T, O)`; any `(..., I)` to `(..., O)` where channels are scaled."""
        y_BTO = self.linear(x_BTI)
        kernel_OK = self.kernel.to(y_BTO.dtype)
        if self.kernel_size == 1:
            return y_BTO * kernel_OK[:, 0]
        if (mask_BT := self.reading.mask_BT) is not None:
            y_BTO = y_BTO * mask_BT[..., None].to(y_BTO.dtype)
        # Shifted and added: a convolution of so few tokens is slower, and leaves its result laid out the other way.
        made_BTO = y_BTO * kernel_OK[:, -1]
        for back in range(1, min(self.kernel_size, y_BTO.shape[1])):
            made_BTO = made_BTO + pad(y_BTO[:, :-back], (0, 0, back, 0)) * kernel_OK[:, -1 - back]
        return made_BTO

    def merge(self) -> nn.Linear:
        """The plain layer that computes the same.

        Raises:
            ValueError: it spans several tokens, which no linear layer does.
        """
        if self.kernel_size > 1:
            raise ValueError(f"a kernel over {self.kernel_size} tokens is no linear map of one")
        scale_O = self.kernel.detach()[:, 0].to(torch.promote_types(self.weight.dtype, torch.float32))
        merged = to_linear(
            (scale_O[:, None] * self.weight.detach()).to(self.weight.dtype), None, training=self.training
        )
        if self.linear.bias is not None:
            bias_O = (scale_O * self.linear.bias.detach()).to(self.linear.bias.dtype)
            merged.register_parameter("bias", nn.Parameter(bias_O, requires_grad=False))
        return merged
