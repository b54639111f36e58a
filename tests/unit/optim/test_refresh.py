"""Refresh learning: up and then down, in both forms, over any optimizer; nothing where the rate is zero."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from overhaul.optim.build import state_bytes
from overhaul.optim.refresh import Refresh, langevin, released


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    return model, torch.randn(20, 6), torch.arange(20) % 3


def trained(wrap: Any, *, steps: int = 6, rule: Any = torch.optim.SGD) -> tuple[nn.Module, list[float]]:
    model, x, y = problem()
    optimizer = wrap(rule(model.parameters(), lr=0.1), model)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.step(closure)
    return model, losses


def up(rate: float, noise: float = 0.0) -> Any:
    return lambda w, g, f, z: langevin(g, f, rate=rate, noise=noise, damping=1.0, normal=z)


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_with_rate_and_noise_zero_it_is_the_optimizer_inside_to_the_bit(rule: Any):
    """Also with running statistics and dropout, which the second look at the batch must not move."""
    plain, _ = trained(lambda inner, _: inner, rule=rule)
    wrapped, _ = trained(
        lambda inner, model: Refresh(inner, up(0.0), every=1, times=2, buffers=list(model.buffers())), rule=rule
    )

    for one, other in zip(plain.state_dict().values(), wrapped.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_loss_goes_up_and_then_below_where_it_was():
    model, x, y = problem()
    model.eval()
    seen: list[float] = []

    def look() -> float:
        with torch.no_grad():
            return float(cross_entropy(model(x), y))

    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = Refresh(inner, up(0.05), every=1)

    def closure() -> Tensor:
        seen.append(look())
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = look()
    optimizer.step(closure)

    assert seen[0] == before
    assert seen[1] > before, "unlearnt"
    assert look() < before, "and learnt"


def test_every_second_step_unlearns():
    _, losses = trained(lambda inner, model: Refresh(inner, up(0.01), every=2), steps=6)

    assert len(losses) == 6 + 3


def test_the_paper_s_step_is_that_of_langevin_dynamics():
    torch.manual_seed(0)
    g, f = torch.randn(4), torch.rand(4)
    noise = torch.stack([
        langevin(g, f, rate=0.1, noise=1.0, damping=0.5, normal=torch.randn(4)) for _ in range(20_000)
    ])  # fmt: skip

    torch.testing.assert_close(noise.mean(0), 0.1 * g / (f + 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(noise.var(0), 2 * 0.1 / (f + 0.5), atol=0.02, rtol=0)


def test_the_released_step_is_the_authors():
    """One SGD step on minus the cross-entropy, in a scratch copy, rescaled tensor by tensor."""
    torch.manual_seed(0)
    weight, gradient, fisher, z = torch.randn(3, 5), torch.randn(3, 5), torch.rand(3, 5), torch.randn(3, 5)
    scratch = weight - 0.01 * (-gradient)
    d = scratch - weight
    wanted = 1e-5 * (weight.norm() / (d.norm() + 1e-20) * d + 1e-3 * z) / (1 + 1e-3 * fisher)

    found = released(weight, gradient, fisher, rate=1e-5, noise=1e-3, damping=1e-3, normal=z)

    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-9)


def test_a_tensor_of_zeros_or_without_gradient_does_not_make_nan():
    zeros, ones = torch.zeros(3), torch.ones(3)
    for weight, gradient in ((zeros, ones), (ones, zeros)):
        found = released(weight, gradient, 0.0, rate=1e-5, noise=0.0, damping=1e-3, normal=ones)
        assert torch.equal(found, zeros)


def test_fisher_information_holds_what_matters():
    g = torch.ones(2)
    found = langevin(g, torch.tensor([100.0, 0.0]), rate=0.1, noise=0.0, damping=1.0, normal=g)

    assert found[0] < 0.02 * found[1]


def test_a_run_that_was_saved_goes_on_to_the_same_bits():
    def run(stop: int | None) -> nn.Module:
        model, x, y = problem()
        make = lambda: Refresh(  # noqa: E731
            torch.optim.AdamW(model.parameters(), lr=0.1), up(0.01, 1.0), every=2, buffers=list(model.buffers())
        )
        optimizer = make()
        torch.manual_seed(1)
        for step in range(7):
            if step == stop:
                state, dice = optimizer.state_dict(), torch.get_rng_state()
                optimizer = make()
                optimizer.load_state_dict(state)
                torch.set_rng_state(dice)

            def closure() -> Tensor:
                optimizer.zero_grad()  # noqa: B023
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        return model

    for one, other in zip(run(None).parameters(), run(3).parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_gradient_to_go_up_may_be_of_some_terms_alone():
    entered: list[str] = []

    @contextlib.contextmanager
    def focus() -> Any:
        entered.append("in")
        yield
        entered.append("out")

    trained(lambda inner, model: Refresh(inner, up(0.01), every=1, focus=focus), steps=2)

    assert entered == ["in", "out"] * 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_of_sgd_weighs_what_was_foretold_wrapped_or_not(momentum: float):
    for wrap in (lambda inner: inner, lambda inner: Refresh(inner, up(0.0), every=1)):
        model, x, y = problem()
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum))
        foretold = state_bytes(optimizer)

        def closure() -> Tensor:
            loss = cross_entropy(model(x), y)  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
        held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        assert foretold == sum(v.nbytes for v in held)
