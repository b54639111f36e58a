"""What a step would do, said without doing it."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from overhaul.artifact import Artifact
from overhaul.method import Pipeline, Training
from overhaul.optim.build import state_bytes
from overhaul.progress import say
from overhaul.recipe import Step
from overhaul.step_data import Given
from overhaul.train import Plan, train

MASTER_BYTES = 4
"""Of a trained parameter's fp32 weight, and of its gradient."""


def say_plan(
    step: Step,
    parent: Artifact,
    data: Given | None,
    out: Path,
    *,
    longest: int,
    dtype: torch.dtype,
) -> None:
    """Says what would be trained or read, how much memory and time it would take, and which files it would write.

    Args:
        step: the method with its options.
        parent: the model; a training step is tried on it twice, for its time.
        data: what would be read.
        out: where the result would go.
        longest: tokens that the model reads at once.
        dtype: of matrix products.
    """
    parameters = sum(p.numel() for p in parent.model.parameters())
    size = parameters * parent.dtype.itemsize
    method = step.method
    say(f"{step.entry.verb} {step.entry.name} on {parent.name}: {parameters:,} parameters, {size / 1e6:.0f} MB")
    if isinstance(method, Training) and data is not None:
        method = data.steps_for(method)
        handed: Any = data
        plan = next(method.stages(parent.model, handed))
        trained = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
        megabytes = _training_bytes(plan, method) / 1e6
        steps = method.steps if plan.steps is None else plan.steps
        read = steps * method.batch_size * method.accumulate * (method.seq_len if plan.unit == "tokens" else 1)
        say(f"trains {trained:,} parameters ({trained / parameters:.3%}): {megabytes:.1f} MB of")
        say("  fp32 weights, gradients and optimizer states" + (", at a time" if method.in_stages() else ""))
        each = " in each stage" if method.in_stages() else ""
        say(f"{steps} steps, {read:,} {plan.unit}{each}\n{plan.stream.describe().tree()}")
        seconds = _seconds(plan, method.model_copy(update={"steps": steps}), dtype)
        say(
            f"about {seconds:.0f} s"
            + (" for the first of several" if method.in_stages() else "")
            + ", from a step tried"
        )
    elif isinstance(method, Pipeline) and (lines := method.outline(parent.model)):
        say("\n".join(lines))
    elif data is not None:
        settings: Any = method
        say(f"{settings.samples} windows of {min(settings.seq_len, longest)} tokens from {data.corpus.name}")
    # Other methods change the size, and so does what is kept as an adapter or as factors.
    same_size = isinstance(method, Training) and getattr(method, "merge", True)
    weights = f"weights ({method.networks * size / 1e6:.0f} MB)" if same_size else "weights"
    say(f"writes {out}: {weights}, overhaul.json, recipe.yaml, README.md, report.html")


def _training_bytes(plan: Plan, method: Training) -> int:
    """Of trained weights, their gradients, what the optimizer keeps (one gradient at a time with `per_layer`), and what
    the objective holds beside them."""
    sizes = [p.numel() for p in plan.model.parameters() if p.requires_grad]
    gradients = max(sizes, default=0) if method.per_layer else sum(sizes)
    held = sum(term.held_bytes() for _, term in plan.objective.parts())
    return MASTER_BYTES * (sum(sizes) + gradients) + state_bytes(plan.optimizer) + held


def _seconds(plan: Plan, method: Training, dtype: torch.dtype) -> float:
    """Time of all steps, by the second of two: the first one warms up, and chooses subspaces where there are any."""
    one, times = method.model_copy(update={"steps": 1}), []
    for _ in range(2):
        began = time.perf_counter()
        train(replace(plan, steps=None), one, dtype=dtype, quiet=True)
        times.append(time.perf_counter() - began)
    first, usual = times
    renewals = math.ceil(method.steps / method.projection.gap) if method.optimizer in ("galore", "fira") else 0
    return method.steps * usual + renewals * max(first - usual, 0.0)
