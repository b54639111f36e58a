"""A linear layer whose trained weight is an fp32 master, multiplied in a narrower type.

Autocast keeps the narrow copy of every weight from the forward to the backward pass: half the model's bytes again,
at the moment when memory is fullest.

Shapes: N tokens, I input features, O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812


def master_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + b with products in `dtype`, `(..., I)` to `(..., O)`; a weight is narrowed when it is needed, twice.

    Results and gradients are those of autocast; the gradient of the weight has the weight's type. Differentiating
    twice raises `RuntimeError`.
    """
    y: Any = _MasterLinear.apply(x, weight_OI, bias_O, dtype)
    return y


class _MasterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        y_NO = F.linear(x_NI, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
        ctx.save_for_backward(x_NI, weight_OI)
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias_O is None else bias_O.dtype
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_NO = grad.reshape(-1, grad.shape[-1]).to(x_NI.dtype)
        grad_x = (grad_NO @ weight_OI.to(x_NI.dtype)).to(ctx.x_dtype).view(*grad.shape[:-1], -1) if need_x else None
        return (
            grad_x,
            (grad_NO.t() @ x_NI).to(weight_OI.dtype) if need_weight else None,
            grad_NO.sum(0, dtype=ctx.bias_dtype) if need_bias else None,
            None,
        )
