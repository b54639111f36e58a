"""Updates in the backward pass give the same weights as one step after it, with one gradient at a time."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from overhaul.adapt.full import Full
from overhaul.errors import Diverged
from overhaul.method import Projection
from overhaul.objective import CrossEntropy
from overhaul.optim.build import build
from overhaul.optim.per_layer import updating
from overhaul.stream import Batch, Repeat, Rows
from overhaul.train import Plan, train


def plan(model: Any, settings: Full) -> Plan:
    windows = [{"input_ids": row, "labels": row} for row in torch.arange(6 * 16).view(6, 16)]
    stream = Batch(Repeat(Rows(windows, name="rows", fingerprint="rows")), batch_size=2)
    rule = build(settings, model.parameters(), model=model)
    return Plan(model=model, objective=CrossEntropy(), stream=stream, optimizer=rule)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "galore", "fira"])
def test_the_weights_are_those_of_one_step_after_the_backward_pass(optimizer: str, tiny: Path):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    low_rank = {"projection": Projection(rank=8, gap=2)} if optimizer in ("galore", "fira") else {}
    settings = Full(**{"optimizer": optimizer, "steps": 4, "lr": 1e-3, "clip": 0, **low_rank})
    whole = AutoModelForCausalLM.from_pretrained(tiny)
    parted = copy.deepcopy(whole)

    at_once = train(plan(whole, settings), settings, quiet=True)
    one_by_one = settings.model_copy(update={"per_layer": True})
    apart = train(plan(parted, one_by_one), one_by_one, quiet=True)

    for name, parameter in parted.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    assert [p["loss"] for p in apart.points] == [p["loss"] for p in at_once.points]
    assert [p["grad_norm"] for p in apart.points] == pytest.approx([p["grad_norm"] for p in at_once.points], rel=1e-5)
    assert apart.optimizer_bytes == at_once.optimizer_bytes


def test_at_most_one_gradient_is_alive_and_none_is_left():
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    alive: list[int] = []

    def look(_norm: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in layers.parameters()))

    with updating(torch.optim.AdamW(layers.parameters(), lr=0.1), look) as take:
        layers(torch.ones(2, 4)).sum().backward()

    assert alive == [1] * 6
    assert all(p.grad is None for p in layers.parameters())
    assert take() > 0
    layers(torch.ones(2, 4)).sum().backward()
    assert all(p.grad is not None for p in layers.parameters()), "the hooks are gone"


def test_no_weight_takes_a_gradient_that_is_not_finite(tiny: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    broken = model.model.layers[0].mlp.up_proj.weight
    broken.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(model.state_dict())
    settings = Full(steps=1, clip=0, per_layer=True)

    with pytest.raises(Diverged, match=r"not finite at step 1, first in model\.layers\.0\.mlp\.up_proj\.weight"):
        train(plan(model, settings), settings, quiet=True)

    after = model.state_dict()
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"]), "comes later"
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"]), "came before"
