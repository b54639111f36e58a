"""The `fira` and `galore-torch` packages, given the same gradients, end at the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from overhaul.method import Projection
from overhaul.optim.low_rank import LowRankAdamW

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
fira: Any = pytest.importorskip("fira")
galore: Any = pytest.importorskip("galore_torch.adamw")

SHAPES = [(48, 32), (32, 48), (32, 32)]
STEPS, RANK, GAP, LR = 20, 8, 6, 0.01


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("rule", ["fira", "galore"])
def test_twenty_steps_on_three_shapes_agree(rule: str, side: Any, scale: float, decay: float):
    torch.manual_seed(0)
    # Of the size that weights have: at 3, fp32 itself is no finer than 2e-7 a step.
    ours = [nn.Parameter(0.05 * torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    own = Projection(rank=RANK, gap=GAP, scale=scale, side=side).model_dump()
    own |= {"residual": "none"} if rule == "galore" else {}
    mine = LowRankAdamW([{"params": ours, **own}], lr=LR, weight_decay=decay)
    common = {"params": theirs, "rank": RANK, "update_proj_gap": GAP, "proj_type": side}
    if rule == "fira":
        peer = fira.FiraAdamW([{**common, "alpha": scale}], lr=LR, weight_decay=decay, no_deprecation_warning=True)
    else:
        peer = galore.AdamW([{**common, "scale": scale}], lr=LR, weight_decay=decay, no_deprecation_warning=True)

    for _ in range(STEPS):
        for p, q in zip(ours, theirs, strict=True):
            gradient = torch.randn_like(p) + 0.1 * q.detach()
            p.grad, q.grad = gradient.clone(), gradient.clone()
        mine.step()
        peer.step()

    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
