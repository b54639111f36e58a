"""LoRA (Hu et al., 2021): a frozen linear layer with a trained low-rank increment, W + (alpha / r) B A.

Shapes: N tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from overhaul.errors import UserError
from overhaul.layers import Adapter, PackedLinear, to_linear
from overhaul.layers.masked import MaskedLinear
from overhaul.machine import product_dtype


class LowRank(Adapter):
    """A frozen linear map with two trained factors, `lora_A` (R, I) and `lora_B` (O, R), both fp32.

    Attributes:
        alpha: the increment is scaled by alpha / rank.
    """

    def __init__(
        self, base: nn.Linear | PackedLinear, lora_A: Tensor, lora_B: Tensor, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base, dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(lora_A.to(device, torch.float32))
        self.lora_B = nn.Parameter(lora_B.to(device, torch.float32))
        self.alpha = alpha

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        """alpha / R."""
        return self.alpha / self.rank

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha}"


class LowRankLinear(LowRank):
    """A frozen linear layer with two trained factors.

    Attributes:
        weight: the base's own parameter (O, I), in its own dtype, frozen.
        bias: the base's own parameter (O,) or None; frozen or trained as it was.
    """

    def __init__(self, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(linear, lora_A, lora_B, alpha, dropout)
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias


class PackedLoRALinear(LowRank):
    """y = base(x) + (alpha / R) dropout(x) A^T B^T over a base whose weights are integers.

    Attributes:
        base: the packed layer, frozen; it computes as it does without an adapter.
    """

    def __init__(self, base: PackedLinear, lora_A: Tensor, lora_B: Tensor, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(base, lora_A, lora_B, alpha, dropout)
        self.base, self.bias = base.requires_grad_(False), None

    @classmethod
    def from_packed(
        cls,
        base: PackedLinear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> PackedLoRALinear:
        """Starts at an increment of zero; arguments are those of `LoRALinear.from_linear`."""
        return cls(base, *start_at_zero(base, rank, generator), alpha, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)`."""
        y = self.base(x)
        if not self.enabled:
            return y
        dtype = product_dtype(x)
        low = F.linear(F.dropout(x, self.dropout, self.training).to(dtype), self.lora_A.to(dtype))
        return y + self.scale * F.linear(low, self.lora_B.to(dtype))

    def dense(self) -> Tensor:
        """The dequantized base + (alpha / R) B A, fp32."""
        return incremented(self.base.dense(), self.lora_A, self.lora_B, self.scale, torch.float32)

    def merge(self) -> nn.Linear:
        """A dense layer, fp32: the sum is not rounded to integers again."""
        return to_linear(self.dense(), self.base.bias, training=self.training)


class LoRALinear(LowRankLinear):
    """y = x W^T + b + (alpha / R) dropout(x) A^T B^T, fused into one node of the graph."""

    def __init__(self, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(linear, lora_A, lora_B, alpha, dropout)
        self.num_pruned = linear.num_pruned if isinstance(linear, MaskedLinear) else 0

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> LoRALinear:
        """Takes over the parameters of `linear` (no copy), freezes its weight and starts at an increment of zero.

        Args:
            linear: the layer to adapt.
            rank: R.
            alpha: the increment is scaled by alpha / rank.
            dropout: share of the adapter's input that is dropped in training.
            generator: draws A; torch's default one if None.
        """
        return cls(linear, *start_at_zero(linear, rank, generator), alpha, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)`."""
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        if self.dropout and self.training:
            low = F.linear(F.dropout(x, self.dropout), self.lora_A)
            return F.linear(x, self.weight, self.bias) + self.scale * F.linear(low, self.lora_B)
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)

    def dense(self) -> Tensor:
        """W + (alpha / R) B A, fp32."""
        return incremented(self.weight, self.lora_A, self.lora_B, self.scale, torch.float32)

    def merge(self) -> nn.Linear:
        """A plain linear layer of the base's dtype.

        Raises:
            UserError: the base is pruned; the increment would fill its zeros.
        """
        if self.num_pruned:
            raise _would_densify(f"a layer with {self.num_pruned:,} pruned weights")
        return to_linear(self.dense().to(self.weight.dtype), self.bias, training=self.training)


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scale: float
) -> Tensor:
    """x W^T + b + scale (x A^T) B^T for a frozen W, `(..., I)` to `(..., O)`.

    Matrix products run in the autocast type where autocast is on, else in the type of `x`; the gradients of A and
    B have their own type. Differentiating twice raises `RuntimeError`.
    """
    y: Any = _LoRALinear.apply(x, weight_OI, bias_O, A_RI, B_OR, scale, product_dtype(x))
    return y


def incremented(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + scale B A in `dtype`, differentiable in A and B."""
    with torch.autocast(weight_OI.device.type, enabled=False):
        return torch.addmm(weight_OI.to(dtype), B_OR.to(dtype), A_RI.to(dtype), alpha=scale)


def start_at_zero(
    linear: nn.Linear | PackedLinear, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A drawn as PyTorch draws the weight of a linear layer, B zero: the increment B A is zero."""
    A_RI = torch.empty(rank, linear.in_features)
    nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5), generator=generator)
    return A_RI, torch.zeros(linear.out_features, rank)


def adapted(layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> LoRALinear | PackedLoRALinear:
    """A LoRA layer over a plain or a packed one, at an increment of zero."""
    if isinstance(layer, PackedLinear):
        return PackedLoRALinear.from_packed(layer, rank, alpha, dropout)
    assert isinstance(layer, nn.Linear)
    return LoRALinear.from_linear(layer, rank, alpha, dropout)


def nearest_lora(
    base: nn.Linear | PackedLinear, change_OI: Tensor, rank: int
) -> tuple[LoRALinear | PackedLoRALinear, float]:
    """The LoRA layer of this rank that is nearest to a change of the weight, and the share of its norm left out."""
    A_RI, B_OR, error = factored(change_OI, rank)
    kind: Any = PackedLoRALinear if isinstance(base, PackedLinear) else LoRALinear
    return kind(base, A_RI, B_OR, float(rank)), error


def factored(change_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A (R, I) and B (O, R) whose product is nearest to a change, and the share of its norm left out.

    The singular values are split evenly between A and B; a rank above that of the change is filled up with zeros.
    """
    U_OK, values_K, V_KI = torch.linalg.svd(change_OI.detach().float(), full_matrices=False)
    kept = min(rank, len(values_K))
    roots_K = values_K[:kept].sqrt()
    A_RI, B_OR = torch.zeros(rank, change_OI.shape[1]), torch.zeros(change_OI.shape[0], rank)
    A_RI[:kept], B_OR[:, :kept] = roots_K[:, None] * V_KI[:kept], U_OK[:, :kept] * roots_K
    error = float(values_K[kept:].norm() / values_K.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return A_RI, B_OR, error


def refuse_pruned(
    model: nn.Module, names: Iterable[str], *, hint: str = "overhaul adapt perp --train mask_lora"
) -> None:
    """Checks before training what `LoRALinear.merge` would find after it.

    Raises:
        UserError: one of the layers called `names` is pruned.
    """
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, MaskedLinear) and layer.num_pruned:
            raise _would_densify(f"{name} has {layer.num_pruned:,} pruned weights", hint)


def _would_densify(given: str, hint: str = "overhaul adapt perp --train mask_lora") -> UserError:
    return UserError(
        f"{given}: merging a plain increment would fill them",
        allowed="mask_lora and adapt randlora train with the mask on; lora_prune masks at the merge",
        hint=hint,
    )


class _LoRALinear(torch.autograd.Function):
    """Keeps x and x A^T for the backward pass, and nothing of size (N, O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x_NI, weight_OI = x.reshape(-1, x.shape[-1]).to(dtype), weight_OI.to(dtype)
        low_NR = x_NI @ A_RI.to(dtype).t()
        y_NO = F.linear(x_NI, weight_OI, None if bias_O is None else bias_O.to(dtype))
        y_NO.addmm_(low_NR, B_OR.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x_NI, low_NR, weight_OI, A_RI, B_OR)
        ctx.scale, ctx.x_dtype, ctx.bias_dtype = scale, x.dtype, None if bias_O is None else bias_O.dtype
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, low_NR, weight_OI, A_RI, B_OR = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B, _, _ = ctx.needs_input_grad
        grad_NO = grad.reshape(-1, grad.shape[-1]).to(x_NI.dtype)
        grad_low_NR = grad_NO @ (ctx.scale * B_OR).to(x_NI.dtype)
        grad_x = None
        if need_x:
            grad_NI = (grad_NO @ weight_OI).addmm_(grad_low_NR, A_RI.to(x_NI.dtype))
            grad_x = grad_NI.view(*grad.shape[:-1], -1).to(ctx.x_dtype)
        return (
            grad_x,
            None,
            grad_NO.sum(0, dtype=ctx.bias_dtype) if need_bias else None,
            (grad_low_NR.t() @ x_NI).to(A_RI.dtype) if need_A else None,
            (grad_NO.t() @ low_NR).to(B_OR.dtype).mul_(ctx.scale) if need_B else None,
            None,
            None,
        )
