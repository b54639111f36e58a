"""A frozen linear layer whose weight is convolved head by head: ConTraCon (Roy et al., ICCV 2023)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.layers import LinearLike, to_linear

Form = Literal["both", "kernels", "gates"]


class _Convolved(torch.autograd.Function):
    """Kernels over frozen slices. torch's gradient of a kernel this large takes 20 times as long as one by FFT."""

    @staticmethod
    def forward(ctx: Any, slices_HOI: Tensor, kernel_HKK: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(slices_HOI)
        ctx.half, ctx.dilation = kernel_HKK.shape[-1] // 2, dilation
        pairs = zip(slices_HOI, kernel_HKK, strict=True)
        how: Any = {"padding": dilation * ctx.half, "dilation": dilation}
        return torch.stack([F.conv2d(one[None, None], kernel[None, None], **how)[0, 0] for one, kernel in pairs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        """`dL/dC[u, v] = sum_oi dL/dW'[o, i] W[o + u, i + v]`: a correlation, which is a product of spectra."""
        (grad_HOI,), (slices_HOI,) = grads, ctx.saved_tensors
        # Wide enough that no lag of a kernel comes round to another one.
        size = [side + ctx.dilation * ctx.half for side in slices_HOI.shape[-2:]]
        spectrum = torch.fft.rfft2(slices_HOI, s=size) * torch.fft.rfft2(grad_HOI, s=size).conj()
        lags_K = ctx.dilation * torch.arange(-ctx.half, ctx.half + 1, device=grad_HOI.device)
        sums = torch.fft.irfft2(spectrum, s=size)
        return None, sums[:, (lags_K % size[0])[:, None], lags_K % size[1]], None


def convolved(slices_HOI: Tensor, kernel_HKK: Tensor, dilation: int = 1) -> Tensor:
    """Each slice by its kernel, as torch's `conv2d` does: stride 1, zeros around it, not flipped.

    Args:
        slices_HOI: images of one channel, which get no gradient.
        kernel_HKK: a kernel for each, with a middle.
        dilation: distance of the numbers under neighbouring numbers of a kernel.
    """
    made: Any = _Convolved.apply(slices_HOI, kernel_HKK, dilation)
    return made


class Reweighted(LinearLike):
    """A projection of attention with the weight `W_i -> conv(W_i; C_i) + b_i + sigmoid(s_i) W_i` for each head i.

    - both: as it stands.
    - kernels: `conv(W_i; C_i) + b_i`.
    - gates: `sigmoid(s_i) W_i`.

    The slice of a head, `(O / H, I)`, is read as an image of one channel; the convolution has stride 1 and zeros around
    it, so that its size stays. In evaluation the weight is computed once for the tensors that it is made of.

    Args:
        linear: the frozen layer; its bias stays as it is.
        heads: that its rows are divided among, in order.
        kernel: C's numbers of a side, odd.
        dilation: distance of the weights under neighbouring numbers of a kernel.
        form: one of the three.

    Raises:
        ValueError: heads do not divide the rows, the kernel is even, or reaches over more than a slice has.
    """

    kernel: nn.Parameter
    shift: nn.Parameter
    gate: nn.Parameter

    def __init__(
        self, linear: nn.Linear, *, heads: int, kernel: int = 15, dilation: int = 1, form: Form = "both"
    ) -> None:
        super().__init__()
        self.linear, self.heads, self.kernel_size, self.dilation = linear, heads, kernel, dilation
        self.form: Form = form
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.out_features % heads:
            raise ValueError(f"{heads} heads do not divide {self.out_features} rows")
        if kernel % 2 == 0:
            raise ValueError(f"a kernel of {kernel} has no middle; use {kernel - 1} or {kernel + 1}")
        reach, side = dilation * (kernel - 1) + 1, min(self.out_features // heads, self.in_features)
        if reach > side:
            raise ValueError(f"a kernel that reaches over {reach} is larger than a slice of {side}")
        for name, tensor in self.unchanged().items():
            self.register_parameter(name, nn.Parameter(tensor))
        self._merged: Tensor | None = None
        self._merged_from: tuple[Tensor, ...] = ()
        self._version = -1
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, at which some models look for its precision."""
        return self.linear.weight

    @property
    def bias(self) -> nn.Parameter | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The frozen bias."""
        return self.linear.bias

    def unchanged(self) -> dict[str, Tensor]:
        """The tensors with which the layer computes what the frozen one does, to the bit, by name."""
        like, side = self.linear.weight, self.kernel_size
        kernel_HKK = like.new_zeros((self.heads, side, side))
        # Halves add up exactly: that of the kernel, and that of the gate, which is sigmoid(0).
        kernel_HKK[:, side // 2, side // 2] = 0.5 if self.form == "both" else 1.0
        gate = 0.0 if self.form == "both" else math.inf
        return self._of_form(kernel_HKK, like.new_zeros(self.heads), like.new_full((self.heads,), gate))

    def drawn(self) -> dict[str, Tensor]:
        """The tensors that a task begins with in the paper: torch's draw for a convolution, and gates of 1."""
        like, side = self.linear.weight, self.kernel_size
        kernel_HKK = like.new_empty((self.heads, side, side))
        nn.init.kaiming_uniform_(kernel_HKK.view(self.heads, 1, side, side), a=math.sqrt(5))
        shift_H = like.new_empty(self.heads).uniform_(-1 / side, 1 / side)
        return self._of_form(kernel_HKK, shift_H, like.new_ones(self.heads))

    def _of_form(self, kernel_HKK: Tensor, shift_H: Tensor, gate_H: Tensor) -> dict[str, Tensor]:
        kernels = {} if self.form == "gates" else {"kernel": kernel_HKK, "shift": shift_H}
        return kernels | ({} if self.form == "kernels" else {"gate": gate_H})

    def dense(self) -> Tensor:
        frozen_OI = self.linear.weight.detach()
        # In bf16 a processor has no fast convolution, and sums of so many products lose too much.
        exact = torch.promote_types(frozen_OI.dtype, torch.float32)
        slices_HOI = frozen_OI.to(exact).reshape(self.heads, -1, self.in_features)
        made_HOI = torch.zeros((), dtype=exact, device=frozen_OI.device)
        with torch.autocast(frozen_OI.device.type, enabled=False):
            if self.form != "gates":
                made_HOI = convolved(slices_HOI, self.kernel.to(exact), self.dilation)
                made_HOI = made_HOI + self.shift.to(exact)[:, None, None]
            if self.form != "kernels":
                made_HOI = made_HOI + self.gate.to(exact).sigmoid()[:, None, None] * slices_HOI
        return made_HOI.reshape(frozen_OI.shape).to(frozen_OI.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)`."""
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._own())
        return F.linear(x, self.dense() if self.training or learns else self._once(), self.linear.bias)

    def merge(self) -> nn.Linear:
        return to_linear(self.dense(), self.linear.bias, training=self.training)

    def train(self, mode: bool = True) -> Reweighted:
        if mode:
            self._merged, self._merged_from = None, ()
        return super().train(mode)

    def _own(self) -> tuple[Tensor, ...]:
        return tuple(self.parameters(recurse=False))

    @torch.no_grad()
    def _once(self) -> Tensor:
        """The weight, computed anew where one of the tensors that it is made of is another one by now."""
        if self._merged is None or not self._is_current():
            self._merged = self.dense()
            self._merged_from = (self.linear.weight.detach(), *(tensor.clone() for tensor in self._own()))
            self._version = self.linear.weight._version
        return self._merged

    def _is_current(self) -> bool:
        (frozen_OI, *own), weight_OI = self._merged_from, self.linear.weight
        # Banks are exchanged below autograd, where fused optimizers write too: no version tells of it, and their values
        # are few. What the frozen weight lay in is held, so that nothing else comes to lie there.
        there = frozen_OI.data_ptr() == weight_OI.data_ptr() and self._version == weight_OI._version
        return there and all(map(_same, own, self._own()))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
