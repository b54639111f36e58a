"""Bregman divergences: what holds a model to what it was, in the space of outputs and in that of weights.

`D_F(p, q) = F(p) - F(q) - <grad F(q), p - q>` of a convex F is nowhere negative, zero where p is q, and not symmetric.
Wang, Li, Shen and Huang (ICLR 2024, arXiv:2403.13249) write the common losses of continual learning as
`cross-entropy + alpha D_Phi(outputs, reference) + beta D_Psi(weights, old weights)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def bregman(convex: Callable[[Tensor], Tensor], p: Tensor, q: Tensor) -> Tensor:
    """The divergence of any convex function, by its definition; the others here are what it comes to.

    Args:
        convex: tensor -> scalar, differentiable at `q`.
        p, q: points, of one shape.

    Returns:
        A scalar with the gradient of `p` and `q`.
    """
    value_q, gradient_q = torch.func.grad_and_value(convex)(q)[::-1]
    return convex(p) - value_q - (gradient_q * (p - q)).sum()


def negative_entropy(p_BC: Tensor) -> Tensor:
    """`sum p log p`, whose divergence between distributions is that of Kullback and Leibler."""
    return torch.xlogy(p_BC, p_BC).sum()


def kl(p_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """`KL(p || q)` of each row, the divergence of the negative entropy with `p` as its first argument.

    Args:
        p_BC: distributions; a one-hot row makes it the cross-entropy of its class.
        log_q_BC: logarithms of distributions.

    Returns:
        `(B,)`, in nats.
    """
    # A class that p has not is not looked at: its logarithm may be minus infinity.
    return (torch.xlogy(p_BC, p_BC) - torch.where(p_BC > 0, p_BC * log_q_BC, 0.0)).sum(dim=-1)


def from_uniform(log_p_BC: Tensor) -> Tensor:
    """`KL(p || uniform) = log C - H(p)` of each row: here the network's distribution comes first.

    Args:
        log_p_BC: logarithms of distributions over C classes.

    Returns:
        `(B,)`, in nats; adding it to a loss rewards entropy (CPR, Cha et al., 2021).
    """
    num_classes = log_p_BC.shape[-1]
    return (log_p_BC.exp() * log_p_BC).sum(dim=-1) + torch.log(log_p_BC.new_tensor(float(num_classes)))


def squared(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """`||p - q||^2` of each row, the divergence of the squared norm.

    Returns:
        `(B,)`.
    """
    return (p_BC - q_BC).square().sum(dim=-1)


def quadratic(theta: Tensor, old: Tensor, curvature: Tensor | float = 1.0) -> Tensor:
    """`1/2 sum F (theta - old)^2`, the divergence of `1/2 theta^T diag(F) theta`; with F = 1 half the squared distance.

    Args:
        theta, old: weights, of one shape.
        curvature: F, such as a diagonal Fisher information; not negative.

    Returns:
        A scalar.
    """
    return 0.5 * (curvature * (theta - old).square()).sum()


def gaussians(mean: Tensor, log_std: Tensor, old_mean: Tensor, old_log_std: Tensor) -> Tensor:
    """`KL(q || q_old)` of independent normal distributions, summed over all weights.

    In natural parameters it is the divergence of the log-partition function, with its arguments in the other order.

    Args:
        mean, log_std: of the distributions q.
        old_mean, old_log_std: of those before.

    Returns:
        A scalar, in nats.
    """
    variance_ratio = (2 * (log_std - old_log_std)).exp()
    distance = ((mean - old_mean) / old_log_std.exp()).square()
    return 0.5 * (variance_ratio + distance - 1 - 2 * (log_std - old_log_std)).sum()
