"""Each row of a batch by increments, or a head, of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from overhaul.layers.joint import Choice, JointHead


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_each_row_has_the_head_of_its_entry(bias: bool, shape: tuple[int, ...]):
    torch.manual_seed(0)
    there, own, choice = nn.Linear(6, 5, bias=bias), [nn.Linear(6, 5, bias=bias) for _ in range(3)], Choice()
    joint = JointHead(there, choice, entries=3)
    for entry, head in enumerate(own):
        for name, place in head.named_parameters():
            joint.own[name].data[entry] = place.data
    x_BXI, entries = torch.randn(shape), [2, 0, 2, 1]

    assert torch.equal(joint(x_BXI), there(x_BXI)), "without a choice, the head that is there"
    choice.take(torch.tensor(entries)[:, None], torch.ones(4, 1))
    wanted = torch.stack([own[entry](x_XI) for entry, x_XI in zip(entries, x_BXI, strict=True)])
    torch.testing.assert_close(joint(x_BXI), wanted)
    assert joint(x_BXI.bfloat16()).dtype == torch.float32
