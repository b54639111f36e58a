"""Layers that draw their weights: the plain layer where they are sure, and the bound written out where they are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F  # noqa: N812 - as losses are written

from overhaul.bregman import gaussians, quadratic
from overhaul.continual import Believed
from overhaul.layers.variational import distributions, make_plain, make_variational, trained_as_means
from overhaul.objective import Forward


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network() -> nn.Sequential:
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1, groups=2, bias=False, padding_mode="reflect")
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def varied(model: nn.Module, log_std: float | Callable[[Tensor], Tensor]) -> nn.Module:
    of = log_std if callable(log_std) else lambda p: torch.full_like(p, log_std)
    return make_variational(model, {name: of(p.detach()) for name, p in trained_as_means(model).items()})


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, 4, 4), torch.arange(5) % 3


def test_without_spread_it_is_the_plain_layer_with_its_gradients():
    x, y = images()
    found = []
    for log_std in (None, -math.inf):
        torch.manual_seed(3)
        model = network() if log_std is None else varied(network(), log_std)
        F.cross_entropy(model(x), y).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if "log_std" not in name})
        assert all(not p.grad.any() for name, p in model.named_parameters() if "log_std" in name)

    plain, certain = found
    assert plain.keys() == certain.keys(), "names stay"
    assert all(torch.equal(plain[name], certain[name]) for name in plain)


def test_evaluation_uses_the_means_and_training_draws_anew():
    x, _ = images()
    plain = network().eval()
    expected = plain(x)
    model = varied(plain, -1.0)

    assert torch.equal(model.eval()(x), expected)
    model.train()
    assert not torch.equal(model(x), model(x))
    assert type(make_plain(model)[0]) is nn.Conv2d
    assert model.state_dict().keys() == network().state_dict().keys()
    assert torch.equal(model.eval()(x).detach(), make_plain(model)(x).detach())


def test_normalisation_stays_as_it_is():
    assert set(trained_as_means(network())) == {"0.weight", "4.weight", "4.bias"}


def test_gradients_are_those_of_the_bound_with_the_same_noise():
    """The negative bound of one task, with two draws: `mean_s -log p(y | x, w_s) + KL / N` (eq. 4 of the paper)."""
    x, y = images()
    model = varied(network(), lambda p: 0.3 * torch.randn_like(p) - 2)
    before = {name: (torch.randn_like(m), 0.2 * torch.randn_like(s)) for name, (m, s) in distributions(model).items()}
    names = list(distributions(model))

    torch.manual_seed(7)
    term: Any = Believed(before)
    ours = sum(F.cross_entropy(model(x), y) for _ in range(2)) / 2 + term.total(Forward(model, {}), {}) / len(y)
    ours.backward()

    torch.manual_seed(7)
    own = {name: tuple(t.detach().clone().requires_grad_() for t in d) for name, d in distributions(model).items()}
    norm = {name: tensor.detach() for name, tensor in model[1].state_dict().items()}
    theirs = torch.zeros(())
    for _ in range(2):
        w = {name: mean + torch.exp(log_std) * torch.randn(mean.shape) for name, (mean, log_std) in own.items()}
        h = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w["0.weight"], stride=2, groups=2)
        h = F.batch_norm(h, None, None, norm["weight"], norm["bias"], training=True).relu().flatten(1)
        theirs = theirs + F.cross_entropy(h @ w["4.weight"].T + w["4.bias"], y) / 2
    for name, (mean, log_std) in own.items():
        was, log_was = before[name]
        theirs = theirs + kl_divergence(Normal(mean, log_std.exp()), Normal(was, log_was.exp())).sum() / len(y)
    theirs.backward()

    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for name in names:
        for found, expected in zip(distributions(model)[name], own[name], strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10)


def test_with_spreads_that_stay_it_pulls_as_ewc_does():
    """The divergence of two normals of one spread is the quadratic with F = 1 / std^2; of spread 1, that of L2."""
    mean, old, log_std = torch.randn(7, 3), torch.randn(7, 3), 0.5 * torch.randn(7, 3)

    torch.testing.assert_close(gaussians(mean, log_std, old, log_std), quadratic(mean, old, (-2 * log_std).exp()))
    torch.testing.assert_close(gaussians(mean, 0 * log_std, old, 0 * log_std), quadratic(mean, old))


# Bayesian linear regression: y ~ N(x w, 1), w ~ N(0, 1); its posterior is known.


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second draw is the one before with the other sign: the gradient of the mean has no noise then."""
    drawn: list[Tensor] = []

    def noise(like: Tensor) -> Tensor:
        if drawn:
            return -drawn.pop()
        drawn.append(torch.randn(like.shape))
        return drawn[0]

    monkeypatch.setattr(torch, "randn_like", noise)


def fitted(layer: Any, before: dict[str, Any], x_ND: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that minimise the negative bound; of the second, over the last half of the steps."""
    term, seen, steps = Believed(before), [], 2000
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        misfit = sum(0.5 * (y_N - layer(x_ND)[:, 0]).square().sum() for _ in range(2)) / 2
        (misfit + term.total(Forward(layer, {}), {})).backward()
        optimizer.step()
        if step >= steps // 2:
            seen.append(layer[0].log_std["weight"].detach()[0].clone())
    return layer[0].weight.detach()[0], torch.stack(seen).mean(dim=0).exp()


def regression(orthogonal: bool, seed: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(12, 3, generator=dice)
    if orthogonal:
        x_ND = torch.linalg.qr(x_ND)[0] * torch.tensor([2.0, 3.0, 1.0])
    y_N = x_ND @ torch.tensor([1.0, -2.0, 0.5]) + torch.randn(12, generator=dice)
    return x_ND, y_N


def test_the_mean_of_bayesian_linear_regression_is_the_closed_form(paired: None):
    """The best factorised normal has the posterior's mean, and the precisions of its diagonal."""
    x_ND, y_N = regression(orthogonal=False, seed=1)
    precision_DD = torch.eye(3) + x_ND.T @ x_ND
    layer = nn.Sequential(nn.Linear(3, 1, bias=False))
    prior = {"0.weight": (torch.zeros(1, 3), torch.zeros(1, 3))}

    mean_D, std_D = fitted(varied(layer, -1.0), prior, x_ND, y_N)

    torch.testing.assert_close(mean_D, torch.linalg.solve(precision_DD, x_ND.T @ y_N), atol=1e-6, rtol=0)
    torch.testing.assert_close(std_D, precision_DD.diagonal().rsqrt(), rtol=0.03, atol=0)


def test_two_tasks_one_after_the_other_are_both_at_once(paired: None):
    """With orthogonal inputs the posterior factorises; what is lost is what the spread of the first was off."""
    (x1, y1), (x2, y2) = (regression(orthogonal=True, seed=seed) for seed in (1, 2))
    layer = nn.Sequential(nn.Linear(3, 1, bias=False))
    prior = {"0.weight": (torch.zeros(1, 3), torch.zeros(1, 3))}

    mean_D, std_D = fitted(varied(layer, -1.0), prior, x1, y1)
    before = {"0.weight": (mean_D[None].clone(), std_D.log()[None])}
    mean_D, std_D = fitted(layer, before, x2, y2)

    precision_DD = torch.eye(3) + x1.T @ x1 + x2.T @ x2
    torch.testing.assert_close(mean_D, torch.linalg.solve(precision_DD, x1.T @ y1 + x2.T @ y2), atol=0.01, rtol=0)
    torch.testing.assert_close(std_D, precision_DD.diagonal().rsqrt(), rtol=0.03, atol=0)
