"""What flows into the trained blocks is the same to the bit at whatever stage it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from overhaul.interop.fused import fused
from overhaul.unlearning.below import Below, Window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_do_not_depend_on_the_blocks_that_a_stage_runs(dtype: torch.dtype):
    """The loop fuses the blocks that it finds: those below round alike all the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
    ids_T = torch.arange(24)
    window = Window({"input_ids": ids_T, "labels": ids_T}, 0)

    def states(cut: int) -> Tensor:
        below = Below(model, dtype)
        below.try_out([1, 2], [window], gigabytes=1)
        assert below.places == (1, 2)
        below.cut(cut)
        try:
            with fused(model):
                return below.with_states(window, 2)["inputs_embeds"]
        finally:
            below.whole(model)

    found = [states(cut) for cut in (0, 1, 2)]
    assert found[0].abs().max() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
