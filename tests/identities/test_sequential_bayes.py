"""EWC is sequential Bayes: on linear regression, two tasks one after the other are both at once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overhaul.bregman import bregman
from overhaul.continual import Pulled
from overhaul.fisher import diagonal, joined
from overhaul.objective import Batch, Forward, Objective, Term

N, D = 40, 4


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def task(seed: int, *, orthogonal: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a regression; each task has weights of its own."""
    dice = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(N, D, generator=dice)
    if orthogonal:
        x_ND = torch.linalg.qr(x_ND)[0] * torch.tensor([3.0, 2.0, 4.0, 1.0])
    return x_ND, x_ND @ torch.randn(D, generator=dice) + 0.1 * torch.randn(N, generator=dice)


def misfit(weight_D: Tensor, x_ND: Tensor, y_N: Tensor) -> Tensor:
    """The mean negative log-likelihood with noise of variance 1, up to a constant."""
    return 0.5 * (y_N - x_ND @ weight_D).square().mean()


def least(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Where a quadratic is least: one step of Newton's method."""
    start_D = torch.zeros(D)
    hessian_DD = torch.func.jacrev(torch.func.grad(loss))(start_D)
    return start_D - torch.linalg.solve(hessian_DD, torch.func.grad(loss)(start_D))


def solved(*tasks: tuple[Tensor, Tensor]) -> Tensor:
    """Least squares on all examples of some tasks."""
    x, y = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    return torch.linalg.lstsq(x, y[:, None]).solution[:, 0]


def information(weight_D: Tensor, x_ND: Tensor) -> Tensor:
    """The whole Fisher information: the mean outer product of gradients of `log p(y | x)`, y of the model itself.

    The gradient is linear in y, so that two values of y with the variance of the noise give the expectation.
    """
    mean_N, found_DD = x_ND @ weight_D, torch.zeros(D, D)
    for row, mean in zip(x_ND, mean_N, strict=True):
        for y in (mean - 1, mean + 1):
            gradient_D = torch.func.grad(misfit)(weight_D, row[None], y[None])
            found_DD += gradient_D.outer(gradient_D) / 2
    return found_DD / len(x_ND)


def test_with_the_whole_information_ewc_is_joint_least_squares():
    first, second, third = (task(seed) for seed in range(3))
    old_D = least(lambda weight_D: misfit(weight_D, *first))
    fisher_DD = information(old_D, first[0])

    def ewc(weight_D: Tensor, of: tuple[Tensor, Tensor]) -> Tensor:
        return misfit(weight_D, *of) + bregman(lambda t: 0.5 * t @ fisher_DD @ t, weight_D, old_D)

    torch.testing.assert_close(old_D, solved(first))
    now_D = least(lambda weight_D: ewc(weight_D, second))
    torch.testing.assert_close(now_D, solved(first, second), rtol=0, atol=1e-10)
    assert not torch.allclose(now_D, solved(second), atol=0.1)

    # Online: one anchor, the last, and the information of all tasks so far.
    old_D, fisher_DD = now_D, fisher_DD + information(now_D, second[0])
    now_D = least(lambda weight_D: ewc(weight_D, third))
    torch.testing.assert_close(now_D, solved(first, second, third), rtol=0, atol=1e-10)


class Misfit(Term):
    """The squared error of a linear model, as a term beside `Pulled`."""

    name = "misfit"

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        return 0.5 * (batch["y"] - forward.model(batch["x"])[:, 0]).square().sum()

    def count(self, batch: Batch) -> int:
        return len(batch["y"])


class Coin(nn.Module):
    """A classifier of two classes whose log-odds are twice a linear map.

    With weights of zero both classes are equally likely, and its Fisher information is that of regression, `x x^T`: the
    variance of the label is 1/4, and the factor 2 counts twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, pixel_values: Tensor) -> Any:
        odds_B1 = 2 * self.linear(pixel_values)
        return SimpleNamespace(logits=torch.cat([odds_B1, torch.zeros_like(odds_B1)], dim=1))


def settled(model: nn.Module, objective: Objective, of: tuple[Tensor, Tensor]) -> Tensor:
    """The weights that the objective leads to, without mini-batches."""
    batch = {"x": of[0], "y": of[1]}
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        forward = Forward(model, batch)
        loss: Any = sum(w * term.total(forward, batch) / term.count(batch) for w, term in objective.parts())
        loss.backward()
        return loss

    optimizer.step(closure)
    return next(model.parameters()).detach()[0].clone()


def test_with_orthogonal_inputs_our_diagonal_and_our_term_do_the_same():
    tasks = [task(seed, orthogonal=True) for seed in range(3)]
    model, known = nn.Linear(D, 1, bias=False), None
    now_D = settled(model, Misfit(), tasks[0])
    torch.testing.assert_close(now_D, solved(tasks[0]), rtol=0, atol=1e-8)

    for number, of in enumerate(tasks[1:], 1):
        seen = {"pixel_values": tasks[number - 1][0], "labels": torch.zeros(N, dtype=torch.long)}
        known = joined(known, diagonal(Coin(), [seen], labels="exact"), keep=1.0)
        pulled = Pulled({"weight": now_D[None]}, {"weight": known["linear.weight"].double()})
        now_D = settled(model, Misfit() + 1.0 * pulled, of)
        torch.testing.assert_close(now_D, solved(*tasks[: number + 1]), rtol=0, atol=1e-5)


def test_with_other_inputs_the_diagonal_alone_is_not_enough():
    first, second = task(0), task(1)
    model = nn.Linear(D, 1, bias=False)
    old_D = settled(model, Misfit(), first)
    pulled = Pulled({"weight": old_D[None]}, {"weight": information(old_D, first[0]).diagonal()[None]})

    assert not torch.allclose(settled(model, Misfit() + pulled, second), solved(first, second), atol=1e-2)
