"""What flows into the trained blocks is the same to the bit at whatever stage it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from overhaul.interop.classifier import classified
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


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (ViTConfig, ViTForImageClassification),
        (DeiTConfig, DeiTForImageClassification),
        (BeitConfig, BeitForImageClassification),
        (Dinov2Config, Dinov2ForImageClassification),
    ],
)
def test_a_classifier_of_images_is_run_from_the_middle(config: type[PreTrainedConfig], kind: type[PreTrainedModel]):
    """On states that differ in a batch, with the logits of the whole."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 8, "patch_size": 2}
    model = kind(config(num_hidden_layers=3, **sizes)).eval()
    images_NCHW = torch.randn(2, 3, 8, 8)
    windows = [
        Window({"pixel_values": image_CHW, "labels": torch.tensor(0)}, n) for n, image_CHW in enumerate(images_NCHW)
    ]
    below = Below(model, torch.float32)
    below.try_out([1, 2], windows, gigabytes=1)
    assert below.places == (1, 2)
    for place in (1, 2):
        states_NTD = torch.stack([below.with_states(window, place)["inputs_embeds"] for window in windows])
        below.cut(place)
        with torch.no_grad():
            found = classified(model, {"pixel_values": images_NCHW, "inputs_embeds": states_NTD}).logits
            assert not torch.allclose(found, classified(model, {"pixel_values": images_NCHW}).logits)
        below.whole(model)
        with torch.no_grad():
            wanted = classified(model, {"pixel_values": images_NCHW}).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert (wanted[0] - wanted[1]).abs().max() > 1e-3
