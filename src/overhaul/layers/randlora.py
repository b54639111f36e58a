"""RandLoRA (Albert et al., 2025): a full-rank increment of which only the scales of fixed random bases are trained.

    dW = s * sum_n B_n diag(lambda_n) A diag(gamma_n)          section 3.2; A, B_n random, shared by all layers

Letters of shapes: T tokens, I input and O output features, d and D the smaller and the larger of both, R rank of a
base, N = ceil(d / R) bases, M = R N >= d. The scaled product of all bases is one matrix S (M, d), and dW = s B S; where
the outputs are the smaller side it is the transpose of that, so that the scales always lie on the smaller side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from overhaul.layers import Adapter, PackedLinear, to_linear
from overhaul.layers.masked import MaskedLinear
from overhaul.machine import product_dtype
from overhaul.random_bases import RandLoRABases


class RandLoRALinear(Adapter):
    """A frozen linear map, dense, pruned or packed, with a full-rank increment of R N + N d trained numbers, fp32.

    Attributes:
        randlora_lambda: (R, N), begins at zero.
        randlora_gamma: (N, d), begins at 1 / max(N, d).
        bases: shared by the layers of a model; no part of the state.
        weight: the base's own parameter (O, I), frozen; None where the base is packed.
        mask: of a pruned base, (O, I) bool, True = kept.
        scale: s.
    """

    mask: Tensor | None

    def __init__(
        self,
        base: nn.Linear | PackedLinear,
        bases: RandLoRABases,
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base, dropout)
        device = base.weight.device
        self.bases, self.scale = bases.to(device), scale
        self.randlora_lambda = nn.Parameter(randlora_lambda.to(device, torch.float32))
        self.randlora_gamma = nn.Parameter(randlora_gamma.to(device, torch.float32))
        self.packed = base.requires_grad_(False) if isinstance(base, PackedLinear) else None
        self.weight = None if self.packed else base.weight.requires_grad_(False)
        self.bias = None if self.packed else base.bias
        mask_OI = base.mask if isinstance(base, MaskedLinear) else None
        self.register_buffer("mask", mask_OI, persistent=False)

    @classmethod
    def from_linear(
        cls, base: nn.Linear | PackedLinear, bases: RandLoRABases, alpha: float, *, paper: bool, dropout: float = 0.0
    ) -> RandLoRALinear:
        """Takes over the parameters of `base` (no copy), freezes its weight and starts at an increment of zero.

        Args:
            base: the layer to adapt.
            bases: of the model.
            alpha: s is alpha / R, as in peft.
            paper: s is alpha / (R sqrt(N)), as in the authors' code.
            dropout: share of the adapter's input that is dropped in training.
        """
        small = min(base.out_features, base.in_features)
        num_bases = math.ceil(small / bases.rank)
        scale = alpha / bases.rank / (math.sqrt(num_bases) if paper else 1)
        gamma_Nd = torch.full((num_bases, small), 1 / max(num_bases, small))
        return cls(base, bases, torch.zeros(bases.rank, num_bases), gamma_Nd, scale, dropout)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        rank, num_bases = self.randlora_lambda.shape
        return f"{self.in_features}, {self.out_features}, rank={rank}, bases={num_bases}, scale={self.scale:.3g}"

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)`."""
        if not self.enabled:
            return self._through_base(x)
        if self.packed is None and not (self.dropout and self.training):
            return self._increment(x, self.weight, self.bias)
        dropped = F.dropout(x, self.dropout, self.training)
        return self._through_base(x) + self._increment(dropped, None, None).to(x.dtype)

    def _through_base(self, x: Tensor) -> Tensor:
        return self.packed(x) if self.packed is not None else F.linear(x, self.weight, self.bias)  # pyright: ignore

    def _increment(self, x: Tensor, weight_OI: Tensor | None, bias_O: Tensor | None) -> Tensor:
        A_Rd, B_DM = self.bases.part(self.out_features, self.in_features, product_dtype(x))
        return randlora_linear(
            x, weight_OI, bias_O, self.randlora_lambda, self.randlora_gamma, A_Rd, B_DM, self.scale, self.mask
        )

    def increment(self) -> Tensor:
        """dW (O, I), fp32, differentiable in the scales."""
        A_Rd, B_DM = self.bases.part(self.out_features, self.in_features)
        with torch.autocast(B_DM.device.type, enabled=False):
            change_Dd = B_DM @ scaled_bases(A_Rd, self.randlora_lambda, self.randlora_gamma, self.scale)
        change_OI = change_Dd if self._scales_inputs() else change_Dd.t()
        return change_OI if self.mask is None else change_OI * self.mask

    def _scales_inputs(self) -> bool:
        return self.in_features <= self.out_features

    def dense(self) -> Tensor:
        """W + dW, fp32."""
        weight_OI = self.packed.dense() if self.packed is not None else self.weight
        return weight_OI.float() + self.increment()  # pyright: ignore[reportOptionalMemberAccess]

    def merge(self) -> nn.Linear:
        """A plain or masked layer of the base's dtype; fp32 over a packed base."""
        dtype = torch.float32 if self.weight is None else self.weight.dtype
        bias_O = self.bias if self.packed is None else self.packed.bias
        linear = to_linear(self.dense().to(dtype), bias_O, training=self.training)
        return linear if self.mask is None else MaskedLinear.from_linear(linear, self.mask)

    def base(self) -> nn.Linear | PackedLinear:
        """The frozen layer alone; of a pruned one, as a plain layer."""
        if self.packed is not None:
            return self.packed
        assert self.weight is not None
        return to_linear(self.weight, self.bias, training=self.training)


def scaled_bases(A_Rd: Tensor, lambda_RN: Tensor, gamma_Nd: Tensor, scale: float) -> Tensor:
    """S (M, d): row k N + n is scale * lambda[k, n] * A[k] * gamma[n].

    Base n's row k meets column k N + n of B, which is peft's pairing; B being random, any other one would do.
    """
    S_RNd = (scale * lambda_RN)[:, :, None] * gamma_Nd
    return S_RNd.mul_(A_Rd[:, None, :]).flatten(0, 1)  # in place: for few tokens this takes as long as a product


def randlora_linear(
    x: Tensor,
    weight_OI: Tensor | None,
    bias_O: Tensor | None,
    lambda_RN: Tensor,
    gamma_Nd: Tensor,
    A_Rd: Tensor,
    B_DM: Tensor,
    scale: float,
    mask_OI: Tensor | None = None,
) -> Tensor:
    """x (W + M * dW)^T + b for a frozen W, `(..., I)` to `(..., O)`; without W the increment alone.

    Either the sum of W and dW is made or the bases are applied one after the other, whichever takes fewer
    multiplications for this number of tokens. Matrix products run in the autocast type where autocast is on, else in
    the type of `x`. Differentiating twice raises `RuntimeError`.
    """
    y: Any = _RandLoRALinear.apply(
        x, weight_OI, bias_O, lambda_RN, gamma_Nd, A_Rd, B_DM, mask_OI, scale, product_dtype(x)
    )
    return y


class _RandLoRALinear(torch.autograd.Function):
    """Keeps x and the scales for the backward pass; S and dW are made again, so nothing of size (M, d) is stored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        lambda_RN: Tensor,
        gamma_Nd: Tensor,
        A_Rd: Tensor,
        B_DM: Tensor,
        mask_OI: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        out = B_DM.shape[0] if x_TI.shape[1] == A_Rd.shape[1] else A_Rd.shape[1]
        left_OM, right_MI = _factors(x_TI.shape[1], lambda_RN, gamma_Nd, A_Rd, B_DM, scale, dtype)
        ctx.save_for_backward(x_TI, weight_OI, lambda_RN, gamma_Nd, A_Rd, B_DM, mask_OI)
        ctx.scale, ctx.x_dtype, ctx.bias_dtype = scale, x.dtype, None if bias_O is None else bias_O.dtype
        bias_O = None if bias_O is None else bias_O.to(dtype)
        (num_tokens, num_in), width = x_TI.shape, B_DM.shape[1]
        if mask_OI is not None or width * num_in * out < num_tokens * width * (num_in + out):
            y_TO = F.linear(x_TI, _summed(weight_OI, left_OM, right_MI, mask_OI), bias_O)
        else:
            y_TO = (x_TI @ right_MI.t()) @ left_OM.t()
            if weight_OI is not None:
                y_TO += F.linear(x_TI, weight_OI.to(dtype), bias_O)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, lambda_RN, gamma_Nd, A_Rd, B_DM, mask_OI = ctx.saved_tensors
        need_x, _, need_bias, need_lambda, need_gamma, *_ = ctx.needs_input_grad
        dtype = x_TI.dtype
        grad_TO = grad.reshape(-1, grad.shape[-1]).to(dtype)
        left_OM, right_MI = _factors(x_TI.shape[1], lambda_RN, gamma_Nd, A_Rd, B_DM, ctx.scale, dtype)
        bank_DM = B_DM.to(dtype)
        scales_inputs = x_TI.shape[1] == A_Rd.shape[1]
        if mask_OI is not None or _sum_is_cheaper(len(x_TI), B_DM.shape, A_Rd.shape[1], scales_inputs):
            grad_TI = grad_TO @ _summed(weight_OI, left_OM, right_MI, mask_OI) if need_x else None
            change_OI = grad_TO.t() @ x_TI
            if mask_OI is not None:
                change_OI = change_OI * mask_OI
            grad_Md = bank_DM.t() @ (change_OI if scales_inputs else change_OI.t())
        else:
            low_TM = grad_TO @ left_OM
            grad_TI = low_TM @ right_MI if need_x else None
            if grad_TI is not None and weight_OI is not None:
                grad_TI.addmm_(grad_TO, weight_OI.to(dtype))
            grad_Md = low_TM.t() @ x_TI if scales_inputs else (x_TI @ bank_DM).t() @ grad_TO
        grad_RNd = grad_Md.to(lambda_RN.dtype).view(*lambda_RN.shape, -1).mul_(A_Rd[:, None, :].to(lambda_RN.dtype))
        return (
            grad_TI.view(*grad.shape[:-1], -1).to(ctx.x_dtype) if grad_TI is not None else None,
            None,
            grad_TO.sum(0, dtype=ctx.bias_dtype) if need_bias else None,
            torch.einsum("rnd,nd->rn", grad_RNd, gamma_Nd).mul_(ctx.scale) if need_lambda else None,
            torch.einsum("rnd,rn->nd", grad_RNd, lambda_RN).mul_(ctx.scale) if need_gamma else None,
            *(None,) * 5,
        )


def _factors(
    num_in: int,
    lambda_RN: Tensor,
    gamma_Nd: Tensor,
    A_Rd: Tensor,
    B_DM: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(O, M) and (M, I) whose product is dW; a square layer scales its inputs."""
    S_Md = scaled_bases(A_Rd, lambda_RN, gamma_Nd, scale).to(dtype)
    bank_DM = B_DM.to(dtype)
    return (bank_DM, S_Md) if num_in == A_Rd.shape[1] else (S_Md.t(), bank_DM.t())


def _summed(weight_OI: Tensor | None, left_OM: Tensor, right_MI: Tensor, mask_OI: Tensor | None) -> Tensor:
    """W + M * dW in the type of the factors; M * dW without W."""
    if weight_OI is not None and mask_OI is None:
        return torch.addmm(weight_OI.to(left_OM.dtype), left_OM, right_MI)
    change_OI = left_OM @ right_MI
    if mask_OI is not None:
        change_OI *= mask_OI
    return change_OI if weight_OI is None else change_OI.add_(weight_OI.to(change_OI.dtype))


def _sum_is_cheaper(num_tokens: int, bank: torch.Size, small: int, scales_inputs: bool) -> bool:
    """Whether a backward pass through W + dW takes fewer multiplications than one through the bases."""
    large, width = bank
    through_sum = num_tokens * large * small + 2 * large * width * small
    through_bases = num_tokens * width * (large * (1 if scales_inputs else 2) + 2 * small)
    return through_sum < through_bases
