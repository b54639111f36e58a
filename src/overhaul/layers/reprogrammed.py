"""A frozen convolution whose output channels are each convolved once more, by a small kernel of their own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

Form = Literal["behind", "residual", "parallel"]


class Reprogrammed(nn.Module):
    """Channel-wise lightweight reprogramming (CLR, Ge et al., 2023) of one convolution f with C output channels.

    - behind: `G f(x)`, with G depth-wise: channel k is convolved with kernel k, padded so that its size stays.
    - residual: `f(x) + a_k (G f(x))_k`.
    - parallel: `f(x) + P x`, with P a convolution of one pixel, strided as f.

    Args:
        convolution: f, which is frozen.
        kernel: pixels of a side of G's kernels, odd; 1 scales each channel.
        form: one of the three.
    """

    kernel: Tensor
    scale: Tensor
    point: Tensor

    def __init__(self, convolution: nn.Conv2d, *, kernel: int = 3, form: Form = "behind") -> None:
        super().__init__()
        self.convolution, self.form, self.kernel_size = convolution, form, kernel
        for name, tensor in self.begin().items():
            self.register_parameter(name, nn.Parameter(tensor))

    @property
    def weight(self) -> Tensor:
        """The frozen convolution's, at which some models look for its precision."""
        return self.convolution.weight

    def begin(self) -> dict[str, Tensor]:
        """The tensors with which the layer computes what the convolution does, by name."""
        like, channels, side = self.convolution.weight, self.convolution.out_channels, self.kernel_size
        if self.form == "parallel":
            return {"point": like.new_zeros((channels, self.convolution.in_channels, 1, 1))}
        kernel_C1KK = like.new_zeros((channels, 1, side, side))
        kernel_C1KK[:, 0, side // 2, side // 2] = 1.0
        return {"kernel": kernel_C1KK} | ({"scale": like.new_zeros(channels)} if self.form == "residual" else {})

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, C_in, H, W)` as the convolution does, to `(B, C, H', W')`."""
        made = self.convolution(x)
        if self.form == "parallel":
            return made + self._beside(x, made)
        again = conv2d(made, self.kernel, padding=self.kernel_size // 2, groups=self.convolution.out_channels)
        return again if self.form == "behind" else made + self.scale[:, None, None] * again

    def _beside(self, x: Tensor, made: Tensor) -> Tensor:
        """One pixel of the input for each of the output: that under the middle of the kernel."""
        beside = conv2d(x, self.point, stride=self.convolution.stride)
        height, width = (min(a, b) for a, b in zip(beside.shape[-2:], made.shape[-2:], strict=True))
        grown = torch.zeros_like(made)
        grown[..., :height, :width] = beside[..., :height, :width]
        return grown
