"""Projected AdamW: what it equals at the ends of its settings, what it keeps, and what it does with bad gradients."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overhaul.errors import UserError
from overhaul.method import Projection
from overhaul.optim.low_rank import EPS, LowRankAdamW, num_state

SHAPES = [(24, 16), (16, 24), (16, 16)]
LR = 0.01


def optimizer(parameters: list[nn.Parameter], **changed: Any) -> LowRankAdamW:
    """One projected group of rank 4, unless told otherwise."""
    group = {**Projection(rank=4).model_dump(), **changed}
    decay = group.pop("weight_decay", 0.0)
    return LowRankAdamW([{"params": parameters, **group}], lr=LR, weight_decay=decay)


def gradients(shape: tuple[int, int], steps: int, seed: int = 0) -> list[Tensor]:
    """Random ones, a few directions larger than the others."""
    source = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, shape[1], dtype=torch.float64)
    return [torch.randn(shape, generator=source, dtype=torch.float64) * scale for _ in range(steps)]


def run(given: list[Tensor], **changed: Any) -> Tensor:
    """The weight, from zero, after these gradients."""
    parameter = nn.Parameter(torch.zeros_like(given[0]))
    rule = optimizer([parameter], **changed)
    for gradient in given:
        parameter.grad = gradient.clone()
        rule.step()
    return parameter.detach()


def adam(given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Adam as it is written down, from zero: the weight, and psi of each step."""
    moment, square, weight, psis = (torch.zeros_like(given[0]) for _ in range(3)), None, None, []
    moment, square, weight = moment
    for step, gradient in enumerate(given, 1):
        moment = 0.9 * moment + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        psis.append(moment / (square.sqrt() + EPS))
        weight = weight - LR * math.sqrt(1 - 0.999**step) / (1 - 0.9**step) * psis[-1]
    return weight, psis


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", ["none", "orthogonal"])
def test_at_full_rank_it_is_adam_in_the_rotated_basis(shape: tuple[int, int], residual: str):
    given = gradients(shape, 6)
    u, _, v = torch.linalg.svd(given[0], full_matrices=False)
    tall = shape[0] >= shape[1]

    rotated, _ = adam([g @ v.t() if tall else u.t() @ g for g in given])

    expected = rotated @ v if tall else u @ rotated
    torch.testing.assert_close(run(given, rank=16, residual=residual), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_where_nothing_is_left_out_fira_is_galore(shape: tuple[int, int], side: str):
    left, right = gradients((shape[0], 3), 1)[0], gradients((3, shape[1]), 1, seed=1)[0]
    given = [left @ diagonal.diag() @ right for diagonal in torch.rand(6, 3, dtype=torch.float64) + 0.5]
    how = {"rank": 3, "side": side, "scaling": "matrix" if side == "full" else "column", "limiter": 0.0}

    galore, fira = (run(given, residual=residual, **how) for residual in ("none", "orthogonal"))

    assert galore.abs().max() > LR
    torch.testing.assert_close(fira, galore, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("residual", ["released", "orthogonal"])
@pytest.mark.parametrize("scaling", ["column", "matrix", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_is_the_formula_written_out(shape: tuple[int, int], side: str, residual: Any, scaling: str):
    if side == "full" and scaling == "column":
        pytest.skip("there are no columns to scale")
    given, alpha, gamma = gradients(shape, 7), 0.25, 1.01
    right = {"std": shape[0] >= shape[1], "reverse_std": shape[0] < shape[1], "left": False}.get(side, True)
    weight, before = torch.zeros(shape, dtype=torch.float64), None
    lows, left, basis = [], torch.eye(1), torch.eye(1)
    for number, gradient in enumerate(given):
        if number % 3 == 0:
            u, _, v = torch.linalg.svd(gradient, full_matrices=False)
            left = u[:, :4].t() if side == "full" or not right else torch.eye(shape[0], dtype=torch.float64)
            basis = v[:4] if right else torch.eye(shape[1], dtype=torch.float64)
        lows.append(left @ gradient @ basis.t())
        psi = adam(lows)[1][-1]
        kept = alpha if residual == "released" else 1.0
        axis: Any = {"column": (1,) if right else (0,), "matrix": (0, 1)}.get(scaling)
        phi = psi.norm(dim=axis, keepdim=True) / (lows[-1].norm(dim=axis, keepdim=True) + 1e-8) if axis else 1.0
        rest = phi * (gradient - kept * left.t() @ lows[-1] @ basis)
        if before is not None and rest.norm() / before > gamma:
            rest = rest * gamma * before / rest.norm()
        before = rest.norm()
        eta = LR * math.sqrt(1 - 0.999 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        weight = (weight - eta * (alpha * left.t() @ psi @ basis + rest)) * (1 - LR * 0.1)

    ours = run(given, side=side, residual=residual, scaling=scaling, scale=alpha, gap=3, weight_decay=0.1)

    torch.testing.assert_close(ours, weight, rtol=1e-6, atol=1e-9)


def test_what_is_not_projected_takes_torchs_adamw_to_the_bit():
    ours, theirs = nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(9))
    matrix = nn.Parameter(torch.ones(8, 8))
    group = {"params": [matrix], **Projection(rank=4).model_dump()}
    rule = LowRankAdamW([group, {"params": [ours]}], lr=LR, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=LR, weight_decay=0.1, fused=True)

    for gradient in torch.randn(5, 9):
        ours.grad, theirs.grad, matrix.grad = gradient.clone(), gradient.clone(), torch.randn(8, 8)
        rule.step()
        reference.step()

    assert torch.equal(ours, theirs)


# The limiter.


def spiked(limiter: float) -> tuple[list[float], Tensor]:
    """Norms of what the limiter sees, over ten steps with a gradient fifty times too large in the sixth."""
    given = gradients((24, 16), 10)
    given[5] = given[5] * 50
    parameter, norms = nn.Parameter(torch.zeros(24, 16, dtype=torch.float64)), []
    rule = optimizer([parameter], limiter=limiter, scaling="none")
    moved = torch.zeros(())
    for number, gradient in enumerate(given):
        parameter.grad, before = gradient.clone(), parameter.detach().clone()
        rule.step()
        moved = (parameter.detach() - before).norm() if number == 5 else moved
        norms.append(float(rule.state[parameter]["rest_norm"]))
    return norms, moved


def test_a_spike_grows_what_is_added_by_no_more_than_the_limit():
    limited, small = spiked(1.01)
    free, large = spiked(0.0)

    assert max(after / before for before, after in pairwise(limited)) <= 1.01 + 1e-6
    assert free[5] / free[4] > 20
    assert small < large / 3


def test_a_gradient_of_zeros_does_not_close_the_limiter_for_good():
    given = gradients((24, 16), 4)
    parameter = nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    rule = optimizer([parameter])
    norms = []
    for gradient in (torch.zeros_like(given[0]), given[0], torch.zeros_like(given[0]), given[1]):
        parameter.grad = gradient
        rule.step()
        norms.append(float(rule.state[parameter]["rest_norm"]) if rule.state[parameter] else None)

    assert norms[0] is None  # nothing was chosen yet
    assert norms[1] > 0.1
    assert norms[2] == norms[1]
    assert 0.1 < norms[3] <= norms[1] * (1.01 + 1e-6)
    assert parameter.isfinite().all()


# State.


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("residual", ["none", "released"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_state_has_as_many_numbers_as_the_formula(shape: tuple[int, int], side: str, residual: str):
    parameter = nn.Parameter(torch.zeros(shape))
    rule = optimizer([parameter], side=side, residual=residual, scaling="matrix")
    parameter.grad = torch.randn(shape)
    rule.step()

    assert sum(tensor.numel() for tensor in rule.state[parameter].values()) == num_state(shape, rule.param_groups[0])
    assert sum(tensor.nbytes for tensor in rule.state[parameter].values()) == sum(
        tensor.untyped_storage().nbytes() for tensor in rule.state[parameter].values()
    ), "a view keeps, and saves, more than it shows"
    if side == "std" and residual == "released":
        small, large = sorted(shape)
        assert num_state(shape, rule.param_groups[0]) == 4 * small + 2 * 4 * large + 2


def test_of_smollm2s_matrices_rank_64_keeps_less_than_a_sixth_of_adams_state():
    width, kv, ffn = 576, 192, 1536
    shapes = [(width, width)] * 2 + [(kv, width)] * 2 + [(ffn, width)] * 2 + [(width, ffn)]
    group = {**Projection(rank=64).model_dump()}

    share = sum(num_state(shape, group) for shape in shapes) / sum(2 * rows * columns for rows, columns in shapes)

    assert 0.154 < share < 0.16


@pytest.mark.parametrize("subspace", ["svd", "randomized", "warm"])
def test_it_goes_on_from_its_saved_state_to_the_bit(subspace: str):
    given = [gradient.float() for gradient in gradients((24, 16), 9)]
    how: dict[str, Any] = {"subspace": subspace, "gap": 4}
    whole = run(given, **how)
    first = nn.Parameter(torch.zeros(24, 16))
    rule = optimizer([first], **how)
    for gradient in given[:5]:
        first.grad = gradient
        rule.step()
    file = io.BytesIO()
    torch.save({"weight": first.detach(), "optimizer": rule.state_dict()}, file)
    file.seek(0)

    saved = torch.load(file, weights_only=True)
    second = nn.Parameter(saved["weight"])
    resumed = optimizer([second], **how)
    resumed.load_state_dict(saved["optimizer"])
    for gradient in given[5:]:
        second.grad = gradient
        resumed.step()

    assert torch.equal(second, whole)


@pytest.mark.parametrize(("name", "other"), [("rank", 8), ("side", "left")])
def test_the_state_of_another_rank_or_side_is_refused(name: str, other: Any):
    saved = optimizer([nn.Parameter(torch.zeros(24, 16))]).state_dict()

    with pytest.raises(UserError, match=f"{name} {saved['param_groups'][0][name]}, this run has {other}"):
        optimizer([nn.Parameter(torch.zeros(24, 16))], **{name: other}).load_state_dict(saved)


def test_a_state_of_bf16_weights_is_loaded_as_it_was():
    given = [gradient.bfloat16() for gradient in gradients((24, 16), 4)]
    first = nn.Parameter(torch.zeros(24, 16, dtype=torch.bfloat16))
    rule = optimizer([first])
    for gradient in given[:2]:
        first.grad = gradient
        rule.step()
    second = nn.Parameter(first.detach().clone())
    resumed = optimizer([second])
    resumed.load_state_dict(rule.state_dict())
    for parameter, own in ((first, rule), (second, resumed)):
        for gradient in given[2:]:
            parameter.grad = gradient
            own.step()

    assert torch.equal(first, second)
    assert {value.dtype for value in resumed.state[second].values()} == {torch.float32}


def test_the_state_of_another_rule_is_refused():
    parameter = nn.Parameter(torch.zeros(24, 16))
    saved = torch.optim.AdamW([parameter]).state_dict()

    with pytest.raises(UserError, match="not that of a low-rank optimizer"):
        optimizer([parameter]).load_state_dict(saved)


# Gradients that are no good.


def test_nothing_is_chosen_before_there_is_a_direction():
    """A subspace of zeros is any, and would stay for a whole gap: rows of LoRA's A would never move."""
    parameter = nn.Parameter(torch.zeros(24, 16))
    rule = optimizer([parameter], residual="none")
    for gradient in (torch.zeros(24, 16), *(gradient.float() for gradient in gradients((24, 16), 3))):
        parameter.grad = gradient
        rule.step()
    whole = run([gradient.float() for gradient in gradients((24, 16), 3)], residual="none")

    assert torch.equal(parameter, whole)
    assert (parameter != 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad: float):
    parameters = [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))]
    rule = optimizer(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(8, 8)
    assert parameters[1].grad is not None
    parameters[1].grad[3, 3] = bad

    rule.step()

    assert all(torch.equal(parameter, torch.ones(8, 8)) for parameter in parameters)
    assert rule.param_groups[0]["num_skipped"] == 1
    assert not rule.state


@pytest.mark.parametrize("subspace", ["svd", "randomized", "warm"])
def test_gradients_of_low_rank_leave_finite_weights(subspace: str):
    thin = torch.outer(torch.ones(24), torch.arange(16.0)).double()

    assert run([thin, thin, 0 * thin, thin], subspace=subspace, gap=1).isfinite().all()


def test_bf16_gradients_are_decomposed_in_fp32():
    parameter = nn.Parameter(torch.ones(24, 16, dtype=torch.bfloat16))
    rule = optimizer([parameter])
    parameter.grad = torch.randn(24, 16).bfloat16()

    rule.step()

    assert rule.state[parameter]["basis"].dtype == torch.float32
    assert parameter.dtype == torch.bfloat16
    assert not torch.equal(parameter, torch.ones_like(parameter))


def test_a_parameter_that_is_no_matrix_is_named():
    with pytest.raises(UserError, match=r"convolution of shape \(2, 3, 4\)"):
        LowRankAdamW(
            [{"params": [("convolution", nn.Parameter(torch.zeros(2, 3, 4)))], **Projection().model_dump()}], lr=LR
        )


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    weight = nn.Parameter(torch.ones(8, 8))
    rule = optimizer([weight])

    def closure() -> Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert float(rule.step(closure).detach()) == 64
    assert float(weight.detach().square().sum()) < 64
