"""RMSNorm as one node of the graph, for training.

Written out in torch it is a dozen nodes, most of them over fp32 copies of the hidden states, and with a weight that is
an fp32 master its result is fp32, which every linear layer behind it casts again.

Shapes: N tokens, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis (Zhang and Sennrich, 2019, equation 4).

    Everything is computed in fp32 (fp64 for fp64 inputs) and rounded once, to `dtype`; the gradient of the weight has
    the weight's type. Differentiating twice raises `RuntimeError`.
    """
    y: Any = _RMSNorm.apply(x, weight_D, epsilon, dtype)
    return y


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a token for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        wide_ND = _wide(x_ND)
        inverse_N1 = wide_ND.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        return (wide_ND * inverse_N1).mul_(weight_D).to(dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        normed_ND = _wide(x_ND) * inverse_N1
        grad_ND = _wide(grad.reshape(x_ND.shape))
        # With n = x / rms and u = grad * weight:  dx = (u - n mean(u n)) / rms,  dweight = sum over tokens of grad n.
        product_ND = grad_ND * normed_ND
        grad_D = product_ND.sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        mean_N1 = product_ND.mul_(weight_D).mean(-1, keepdim=True)
        grad_x_ND = (grad_ND * weight_D).addcmul_(normed_ND, mean_N1, value=-1).mul_(inverse_N1)
        return grad_x_ND.to(x_ND.dtype).view(grad.shape), grad_D, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
