"""From a training method's settings to its optimizer: the one place that knows which update rules there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from overhaul import sharding
from overhaul.errors import UserError
from overhaul.matrices import manifest
from overhaul.method import Training
from overhaul.optim import adamw8bit
from overhaul.optim.adamw import adamw
from overhaul.optim.low_rank import LowRankAdamW, num_state
from overhaul.optim.refresh import Refresh
from overhaul.optim.sgd import SGDW
from overhaul.progress import say


def build(
    settings: Training, parameters: Iterable[nn.Parameter], *, model: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimizer that `settings` ask for; the parameters become fp32 masters in place.

    Args:
        settings: update rule, rate, decay and projection.
        parameters: what is trained.
        model: holds them, and more; of its parameters the matrices of attention and MLP are projected. None where all
            parameters belong to one block.

    Raises:
        UserError: nothing can be projected, a package is missing, or several processes are too many.
    """
    _refuse_processes(settings)
    parameters = [parameter for parameter in parameters if parameter.numel()]  # optimizers trip over empty ones
    how: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        for parameter in parameters:
            parameter.data = parameter.data.float()
        momentum = getattr(settings, "momentum", 0.0)
        return SGDW(parameters, lr=settings.lr, momentum=momentum, decay=settings.weight_decay)
    if settings.optimizer == "adamw":
        return adamw(parameters, **how)
    if settings.optimizer == "adamw8bit":
        return adamw8bit.adamw8bit(parameters, **how)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    within = parameters if model is None else _of_attention_and_mlp(model)
    chosen = _projected(settings, parameters, within)
    rule = {**settings.projection.model_dump(), **({"residual": "none"} if settings.optimizer == "galore" else {})}
    projected = [p for p in parameters if id(p) in chosen]
    groups: list[dict[str, Any]] = [{"params": projected, **rule}]
    if rest := [p for p in parameters if id(p) not in chosen]:
        groups.append({"params": rest})
    return LowRankAdamW(groups, **how, check_finite=False)  # the loop does, and says where


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer's state will take when every parameter has had a gradient."""
    trained = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, Refresh):
        return state_bytes(optimizer.inner)
    if isinstance(optimizer, torch.optim.SGD):
        return sum(4 * p.numel() for p, group in trained if group["momentum"])
    if isinstance(optimizer, LowRankAdamW):
        return 4 * sum(num_state(p.shape, group) for p, group in trained)
    if isinstance(optimizer, torch.optim.AdamW):
        return sum(4 * (2 * p.numel() + 1) for p, _ in trained)
    return adamw8bit.MAP_BYTES + sum(adamw8bit.state_bytes(p) for p, _ in trained)


def _refuse_processes(settings: Training) -> None:
    several = sharding.num_processes() > 1
    if several and settings.per_layer:
        raise UserError(
            "--per-layer updates a weight before the processes have shared its gradient",
            allowed="one process",
            hint="without accelerate launch, or without --per-layer",
        )
    if several and settings.optimizer != "adamw" and sharding.is_sharded():
        raise UserError(
            f"--optimizer {settings.optimizer} needs whole matrices, and FSDP leaves each process a part of them",
            allowed="adamw under FSDP; all of them under data parallelism",
            hint="accelerate launch without --use_fsdp",
        )


def _of_attention_and_mlp(model: nn.Module) -> list[nn.Parameter]:
    return [listed.parameter for listed in manifest(model) if listed.category in ("attention", "mlp")]


def _projected(settings: Training, trained: list[nn.Parameter], within: list[nn.Parameter]) -> set[int]:
    """Which of the trained parameters are projected, by identity; says how many matrices are too small for it."""
    inside, rank = {id(p) for p in within}, settings.projection.rank
    matrices = [p for p in trained if id(p) in inside and p.ndim == 2]
    large = [p for p in matrices if min(p.shape) > rank]
    if not large:
        sides = sorted({min(p.shape) for p in matrices})
        raise UserError(
            f"--optimizer {settings.optimizer} has nothing to project: "
            + (f"the matrices that are trained have smaller sides of {', '.join(map(str, sides))}, "
               f"none above --projection.rank {rank}" if sides else "no matrix of attention or MLP is trained"),
            hint=f"--projection.rank {max(1, sides[-1] // 4)}" if sides else "--optimizer adamw",
        )  # fmt: skip
    if small := len(matrices) - len(large):
        say(f"{small} of {len(matrices)} matrices have a side of at most --projection.rank {rank}: plain AdamW")
    return {id(p) for p in large}
