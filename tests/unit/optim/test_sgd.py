"""SGD with decoupled decay: torch's own without it, and what a decay alone does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from overhaul.learn.bregman import Bregman
from overhaul.optim.build import build
from overhaul.optim.sgd import SGDW

LR, DECAY = 0.1, 0.3


def moved(rule: type[torch.optim.Optimizer], gradients: torch.Tensor, **settings: float) -> torch.Tensor:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = rule([weight], lr=LR, **settings)  # pyright: ignore[reportCallIssue]
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_decay_it_is_torchs(momentum: float):
    gradients = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    assert torch.equal(moved(SGDW, gradients, momentum=momentum), moved(torch.optim.SGD, gradients, momentum=momentum))


def test_decay_shrinks_weights_and_stays_out_of_the_momentum():
    gradients = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    weight, velocity = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3)
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient
        weight = (1 - LR * DECAY) * weight - LR * velocity

    torch.testing.assert_close(moved(SGDW, gradients, momentum=0.9, decay=DECAY), weight)
    coupled = moved(torch.optim.SGD, gradients, momentum=0.9, weight_decay=DECAY)
    assert not torch.allclose(coupled, weight, atol=1e-3)


def test_gradients_are_taken_before_the_decay():
    """As AdamW's: the closure sees the weights as they are."""
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = SGDW([weight], lr=LR, decay=DECAY)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 4.0
    assert float(weight.detach()) == pytest.approx((1 - LR * DECAY) * 2.0 - LR * 4.0)


def test_the_setting_reaches_it():
    weight = nn.Parameter(torch.tensor([1.0]))
    rule = build(Bregman(lr=LR, momentum=0.9, weight_decay=DECAY), [weight])
    weight.grad = torch.zeros(1)
    for _ in range(3):
        rule.step()

    # With a coupled decay the momentum would carry the shrinking on.
    assert float(weight.detach()) == pytest.approx((1 - LR * DECAY) ** 3)
