"""AdamW on a low-rank projection of each gradient: GaLore (Zhao et al., 2024), and Fira (Chen et al., 2024).

    R = G Q^T                      Q: leading right singular vectors of a gradient, renewed every `gap` steps
    M = b1 M + (1 - b1) R          V = b2 V + (1 - b2) R * R          psi = M / (sqrt(V) + eps)
    W = W - eta (alpha psi Q + S)  eta = lr sqrt(1 - b2^t) / (1 - b1^t)

S = 0 is GaLore. Fira adds what the projection dropped, scaled as Adam scaled what it kept:

    phi = |psi| / |R|              one number for each row of R, or one for the matrix
    S = phi (G - c R Q)            c = alpha as released, c = 1 for the true complement
    |S| <= gamma |S before|        the limiter

A projection from the left is one from the right of the transposed matrix, and is computed so. At full rank the
complement is 0 and both are Adam in a rotated basis. Moments are neither reset nor turned when Q changes.

Shapes: O rows and I columns of a matrix, A and B the same after turning, R the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_step

from overhaul.errors import UserError
from overhaul.optim.subspace import leading

EPS = 1e-6
"""Of the projected part, as released; what is not projected takes torch's AdamW with torch's own 1e-8."""
SHAPING = ("rank", "side")
"""Settings of a projected group that its stored moments have been shaped by."""


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW whose groups with a `rank` keep moments of projected gradients only; other groups are torch's AdamW.

    Args:
        groups: parameters in groups. A projected one has `rank`, `gap`, `scale`, `side`, `subspace`, `residual`,
            `scaling` and `limiter`, named and valued as in `overhaul.method.Projection`; `residual` may be `none`,
            which is GaLore.
        lr: peak rate.
        weight_decay: decoupled; of projected matrices after the update, as released.
        check_finite: whether a step looks through all gradients first; for nothing where the loop has done so.

    Raises:
        UserError: a projected parameter is no matrix.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        check_finite: bool = True,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "num_skipped": 0}
        own = [{"eps": EPS if "rank" in group else 1e-8, "fused": "rank" not in group, **group} for group in groups]
        super().__init__(own, defaults)
        self.check_finite = check_finite
        for group in self.param_groups:
            if "rank" in group:
                _refuse_unless_matrices(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore - torch overloads it
        """One update; a step with a gradient that is not finite changes nothing and is counted in `num_skipped`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.check_finite and not self._is_finite():
            self.param_groups[0]["num_skipped"] += 1
            return loss
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if "rank" not in group:
                self._plain(trained, group)
                continue
            for parameter in trained:
                _update(parameter, self.state[parameter], group)
        return loss

    def _is_finite(self) -> bool:
        given = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return not given or bool(torch.nn.utils.get_total_norm(given).isfinite())

    def _plain(self, trained: list[Tensor], group: dict[str, Any]) -> None:
        """Exactly what `torch.optim.AdamW(fused=True)` does."""
        for p in trained:
            if not self.state[p]:
                step = torch.zeros((), device=p.device)  # fp32, on the device: what the fused kernel counts in
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in trained]
        if trained:
            adamw_step(
                trained,
                [p.grad for p in trained if p.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, also for weights of another type than the state's.

        Raises:
            UserError: the state is none of this kind, or was made with another rank or side: its moments have other
                shapes, or mean something else.
        """
        saved_groups = state_dict["param_groups"]
        if [("rank" in group) for group in saved_groups] != [("rank" in group) for group in self.param_groups]:
            raise UserError(
                "the optimizer's state is not that of a low-rank optimizer with these groups",
                hint="the --optimizer that the run began with",
            )
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            for name in SHAPING:
                if own.get(name) != saved.get(name):
                    raise UserError(
                        f"the optimizer's state was made with {name} {saved.get(name)}, this run has {own.get(name)}",
                        hint=f"--projection.{name} {saved.get(name)}",
                    )
        super().load_state_dict(state_dict)
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            if "rank" in own:  # torch gives a state the type of its parameter; this one is kept wider than bf16
                for parameter, index in zip(own["params"], saved["params"], strict=True):
                    kept = state_dict["state"].get(index, {})
                    self.state[parameter].update({
                        name: value.to("cpu" if name == "step" else parameter.device, copy=True)
                        for name, value in kept.items()
                    })  # fmt: skip


def num_state(shape: Sequence[int], group: Mapping[str, Any]) -> int:
    """How many fp32 numbers are kept for a parameter: r min + 2 r max for `std`, and two scalars for Fira, one else."""
    if "rank" not in group:
        return 2 * math.prod(shape) + 1
    rows, columns = shape if _is_right(shape, group["side"]) else reversed(shape)
    rank = min(group["rank"], rows, columns)
    bases = rank * columns + (rank * rows if group["side"] == "full" else 0)
    moments = 2 * rank * (rank if group["side"] == "full" else rows)
    return bases + moments + 1 + (group["residual"] != "none")


def _update(parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    """One matrix: renew its subspace if it is time, then Adam inside, the scaled rest outside."""
    assert parameter.grad is not None
    work = torch.promote_types(parameter.dtype, torch.float32)
    grad, weight = parameter.grad.to(work), parameter.to(work)
    right = _is_right(parameter.shape, group["side"])
    if "basis" not in state and not grad.any():
        # Nothing leads in zeros, as LoRA's A has them at the first step: any subspace would be a wrong one for long.
        _decay(parameter, group)
        return
    if not state:
        state["step"] = torch.zeros(())
    if "basis" not in state or (int(state["step"]) % group["gap"] == 0 and grad.any()):
        _renew(grad, state, group, right)
    grad_AB, weight_AB = (grad, weight) if right else (grad.t(), weight.t())
    low_AR = _into(grad_AB, state)
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low_AR), torch.zeros_like(low_AR)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(low_AR, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(low_AR, low_AR, value=1 - beta2)
    psi_AR = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
    step = int(state["step"])
    eta = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    inside_AR = group["scale"] * psi_AR
    if group["residual"] != "none":
        # alpha psi Q + phi (G - c R Q) = (alpha psi - c phi R) Q + phi G: no third product, no second matrix.
        kept = group["scale"] if group["residual"] == "released" else 1.0
        phi = _scaled(grad_AB, low_AR, psi_AR, kept, state, group)
        inside_AR -= kept * phi * low_AR
        weight_AB.addcmul_(grad_AB, phi, value=-eta)
    _add_back(weight_AB, inside_AR, state, -eta)
    _decay(weight, group)
    if weight is not parameter:
        parameter.copy_(weight)


def _decay(weight: Tensor, group: Mapping[str, Any]) -> None:
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])


def _renew(grad_OI: Tensor, state: dict[str, Any], group: Mapping[str, Any], right: bool) -> None:
    rank = min(group["rank"], *grad_OI.shape)
    sides = {"basis": right} | ({"basis_left": False} if group["side"] == "full" else {})
    for name, is_right in sides.items():
        state[name] = leading(grad_OI, rank, group["subspace"], right=is_right, before=state.get(name))


def _into(grad_AB: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    low_AR = grad_AB @ state["basis"].t()
    return state["basis_left"] @ low_AR if "basis_left" in state else low_AR


def _add_back(weight_AB: Tensor, inside_AR: Tensor, state: Mapping[str, Tensor], factor: float) -> None:
    if "basis_left" in state:
        inside_AR = state["basis_left"].t() @ inside_AR
    weight_AB.addmm_(inside_AR, state["basis"], alpha=factor)


def _scaled(
    grad_AB: Tensor, low_AR: Tensor, psi_AR: Tensor, kept: float, state: dict[str, Any], group: Mapping[str, Any]
) -> Tensor:
    """What the rest is multiplied by, the limiter's factor in it: phi as `(A, 1)`, or `(1, 1)` for the matrix.

    The rows of Q are orthonormal, so that |G - c R Q|^2 = |G|^2 - (2 c - c^2) |R|^2, row by row.
    """
    column = group["scaling"] == "column"
    whole: dict[str, Any] = {"dim": 1 if column else (0, 1), "keepdim": True}
    low = torch.linalg.vector_norm(low_AR, **whole)
    phi = torch.ones_like(low)
    if group["scaling"] != "none":
        phi = torch.linalg.vector_norm(psi_AR, **whole) / (low + 1e-8)
    rest = torch.linalg.vector_norm(grad_AB, **whole).square() - (2 * kept - kept**2) * low.square()
    norm = (phi.square() * rest.clamp_min(0)).sum().sqrt()
    before = state.get("rest_norm")
    limit = group["limiter"]
    if before is None:
        state["rest_norm"] = norm
        return phi
    factor = (limit / (norm / (before + 1e-8)).clamp_min(limit)) if limit else torch.ones_like(norm)
    # A gradient of zeros leaves the norm as it was: from 0 the limiter would never let it grow again.
    factor = torch.where(before > 0, factor, 1.0)
    state["rest_norm"] = torch.where(norm > 0, norm * factor, before)
    return phi * factor


def _is_right(shape: Sequence[int], side: str) -> bool:
    """Whether right singular vectors are used: those of the smaller side in `std`."""
    tall = shape[0] >= shape[1]
    return {"std": tall, "reverse_std": not tall, "left": False, "right": True, "full": True}[side]


def _refuse_unless_matrices(group: Mapping[str, Any]) -> None:
    names = group.get("param_names", [f"number {index}" for index in range(len(group["params"]))])
    for name, parameter in zip(names, group["params"], strict=True):
        if parameter.ndim != 2:
            raise UserError(
                f"parameter {name} of shape {tuple(parameter.shape)} cannot be projected",
                allowed="matrices in groups with a rank",
                hint="a group of its own without a rank, which takes plain AdamW",
            )
