from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from overhaul.layers.masked import MaskedLinear
from overhaul.prune.random import RandomPruning


def masks(directory: Path, method: RandomPruning) -> list[Tensor]:
    model = method.apply(AutoModelForCausalLM.from_pretrained(directory).eval(), None)
    return [module.mask for module in model.modules() if isinstance(module, MaskedLinear)]


def test_the_seed_decides_the_masks(tiny: Path) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(masks(tiny, RandomPruning()))
    first, again, other = made

    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[3])  # q and o of one block: same shape, drawn one after the other


def test_counts_are_exact(tiny: Path) -> None:
    for mask_OI in masks(tiny, RandomPruning(sparsity=0.7)):
        assert int((~mask_OI).sum()) == int(0.7 * mask_OI.numel())
