"""Which parameters are trained beside the head, by name, whatever the architecture calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from overhaul.errors import UserError
from overhaul.learners.learner import parameters_like

MODELS: dict[str, Any] = {
    "separate, with biases": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=8,
                  patch_size=4)
    ),
    "grouped queries": lambda: LlamaForSequenceClassification(
        LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                    intermediate_size=8, vocab_size=9)
    ),
    "fused": lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9)),
    "called otherwise": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=8, vocab_size=9)
    ),
    "fused, called otherwise": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=9,
                         pad_token_id=0)
    ),
}  # fmt: skip
WANTED = {"separate, with biases": 2 * 6, "grouped queries": 2 * 3, "fused": 2 * 2, "called otherwise": 2 * 6,
          "fused, called otherwise": 2}  # fmt: skip


@pytest.mark.parametrize("shape", MODELS)
def test_qkv_are_those_of_attention_in_one_or_in_three(shape: str):
    with torch.device("meta"):
        found = parameters_like(MODELS[shape](), ("qkv",))

    assert len(found) == WANTED[shape]
    assert not any("mlp" in name or "out" in name or "o_proj" in name for name in found)


def test_patterns_are_joined_and_one_that_selects_nothing_is_refused():
    with torch.device("meta"):
        model = MODELS["grouped queries"]()

    assert parameters_like(model, ("all",)) == [name for name, _ in model.named_parameters()]
    assert parameters_like(model, ("*layers.1.mlp*", "*norm.weight")) == [
        name for name, _ in model.named_parameters() if "layers.1.mlp" in name or name.endswith("norm.weight")
    ]
    with pytest.raises(UserError, match="no parameter is like 'qvk'"):
        parameters_like(model, ("qvk",))
