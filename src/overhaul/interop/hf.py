"""What this project needs to know of transformers' names, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from overhaul.layers import LinearLike

# Configurations that change the logits after the output embedding; those models keep their own forward.
_LOGIT_CHANGES = (
    "final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale", "lm_head_multiplier",
    "logits_soft_cap", "output_logit_soft_cap",
)  # fmt: skip


class Head(NamedTuple):
    """The output embedding: `weight` (V, D) and an optional `bias` (V,)."""

    weight: Tensor
    bias: Tensor | None


def body(model: nn.Module) -> nn.Module:
    """The decoder without the output embedding."""
    inner: Any = model
    return inner.base_model


class Outputs(NamedTuple):
    """What one pass through a model gives.

    Attributes:
        hidden: last hidden states `(B, T, D)`; None where the model's own logits are there instead.
        logits: `(B, T, V)`, of models whose logits are more than a linear map of the hidden states.
        states: the embedding's output and that of every block, `(B, T, D)` each, where they were asked for; the last
            of them has passed the final norm.
    """

    hidden: Tensor | None
    logits: Tensor | None
    states: tuple[Tensor, ...] | None


def hidden_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Last hidden states `(B, T, D)` of a causal language model."""
    return body(model)(**_inputs(batch), use_cache=False).last_hidden_state


def outputs(model: nn.Module, batch: Mapping[str, Tensor], *, states: bool = False) -> Outputs:
    """One pass through a causal language model: hidden states, or logits where these do not say all."""
    runs: Any = body(model) if has_linear_head(model) else model
    more = {"output_hidden_states": True} if states else {}
    made = runs(**_inputs(batch), use_cache=False, **more)
    kept = made.hidden_states if states else None
    return Outputs(None, made.logits, kept) if runs is model else Outputs(made.last_hidden_state, None, kept)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def depth(config: Any) -> int:
    """How many blocks a model of this configuration has."""
    return config.get_text_config().num_hidden_layers


def width(config: Any) -> int:
    """How wide the hidden states of a model of this configuration are."""
    return config.get_text_config().hidden_size


def num_words(config: Any) -> int:
    """How many rows the output embedding of a model of this configuration has; the tokenizer may have fewer words."""
    return config.get_text_config().vocab_size


def has_linear_head(model: nn.Module) -> bool:
    """Whether the logits are a linear map of the last hidden states."""
    outer: Any = model
    if any(getattr(outer.config, name, None) not in (None, 1, 1.0) for name in _LOGIT_CHANGES):
        return False
    if hasattr(outer, "head"):  # ModernBERT's decoders have a layer between the body and the output embedding
        return False
    return isinstance(outer.get_output_embeddings(), nn.Linear | LinearLike)


def head(model: nn.Module) -> Head | None:
    """The output embedding's effective weight, or None when the logits are more than a linear map."""
    if not has_linear_head(model):
        return None
    outer: Any = model
    layer = outer.get_output_embeddings()
    return Head(layer.dense() if isinstance(layer, LinearLike) else layer.weight, layer.bias)
