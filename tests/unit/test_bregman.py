"""Bregman divergences: each equals the definition, value and gradient, and a reference written by others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from overhaul.bregman import bregman, from_uniform, gaussians, kl, negative_entropy, quadratic, squared

B, C = 6, 5


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def distributions() -> Tensor:
    return torch.randn(B, C).softmax(dim=-1)


def same(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Value and gradient agree to 1e-10."""
    found = []
    for function in (one, other):
        point = at.clone().requires_grad_()
        value = function(point)
        value.backward()
        found.append((value.detach(), point.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_negative_entropy_makes_the_divergence_of_kullback_and_leibler():
    reference = distributions()

    same(
        lambda u: kl(reference, u.log_softmax(-1)).sum(),
        lambda u: bregman(negative_entropy, reference, u.softmax(-1)),
        torch.randn(B, C),
    )
    same(
        lambda u: kl(reference, u.log_softmax(-1)).sum(),
        lambda u: functional.kl_div(u.log_softmax(-1), reference, reduction="sum"),
        torch.randn(B, C),
    )


def test_with_labels_it_is_cross_entropy():
    labels_B = torch.arange(B) % C
    same(
        lambda u: kl(functional.one_hot(labels_B, C).double(), u.log_softmax(-1)).sum(),
        lambda u: functional.cross_entropy(u, labels_B, reduction="sum"),
        torch.randn(B, C),
    )


def test_a_class_that_is_masked_on_both_sides_counts_nothing():
    p_BC = torch.tensor([[0.5, 0.5, 0.0]])
    log_q_BC = torch.tensor([[0.0, 0.0, -torch.inf]]).log_softmax(-1).requires_grad_()

    value = kl(p_BC, log_q_BC)
    value.sum().backward()

    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert log_q_BC.grad is not None
    assert log_q_BC.grad.isfinite().all()


def test_the_network_comes_first_against_uniform():
    uniform = torch.full((B, C), 1 / C)
    same(
        lambda u: from_uniform(u.log_softmax(-1)).sum(),
        lambda u: bregman(negative_entropy, u.softmax(-1), uniform),
        torch.randn(B, C),
    )
    logits = torch.randn(B, C)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(from_uniform(logits.log_softmax(-1)), torch.log(torch.tensor(float(C))) - entropy)


def test_the_order_of_the_arguments_matters():
    p, q = distributions(), distributions()

    assert not torch.allclose(kl(p, q.log()), kl(q, p.log()))


def test_the_squared_norm_makes_the_squared_distance():
    target = torch.randn(B, C)
    same(
        lambda u: squared(u, target).sum(),
        lambda u: bregman(lambda t: t.square().sum(), u, target),
        torch.randn(B, C),
    )
    u = torch.randn(B, C)
    torch.testing.assert_close(squared(u, target).mean() / C, functional.mse_loss(u, target))


def test_a_quadratic_form_makes_the_penalty_of_ewc():
    old, fisher = torch.randn(7, 3), torch.rand(7, 3)
    same(
        lambda theta: quadratic(theta, old, fisher),
        lambda theta: bregman(lambda t: 0.5 * (fisher * t.square()).sum(), theta, old),
        torch.randn(7, 3),
    )
    theta = torch.randn(7, 3)
    torch.testing.assert_close(quadratic(theta, old), 0.5 * (theta - old).square().sum())


def test_normal_distributions_have_the_divergence_of_their_log_partition():
    old_mean, old_log_std, log_std = torch.randn(9), 0.3 * torch.randn(9), 0.3 * torch.randn(9)
    same(
        lambda mean: gaussians(mean, log_std, old_mean, old_log_std),
        lambda mean: kl_divergence(Normal(mean, log_std.exp()), Normal(old_mean, old_log_std.exp())).sum(),
        torch.randn(9),
    )

    def natural(mean: Tensor, log_std: Tensor) -> Tensor:
        """`(mean / variance, -1 / (2 variance))`."""
        precision = (-2 * log_std).exp()
        return torch.stack([mean * precision, -0.5 * precision])

    def log_partition(eta: Tensor) -> Tensor:
        return (-eta[0].square() / (4 * eta[1]) - 0.5 * torch.log(-2 * eta[1])).sum()

    mean = torch.randn(9)
    swapped = bregman(log_partition, natural(old_mean, old_log_std), natural(mean, log_std))
    torch.testing.assert_close(gaussians(mean, log_std, old_mean, old_log_std), swapped)


@pytest.mark.parametrize("seed", range(5))
def test_divergences_are_zero_at_the_reference_and_nowhere_negative(seed: int):
    torch.manual_seed(seed)
    p, q, theta, old = distributions(), distributions(), torch.randn(4), torch.randn(4)

    assert torch.allclose(kl(p, p.log()), torch.zeros(B), atol=1e-12)
    assert float(gaussians(theta, old, theta, old)) == float(quadratic(theta, theta)) == 0.0
    assert (kl(p, q.log()) > 0).all()
    assert float(gaussians(theta, old, old, theta)) > 0
