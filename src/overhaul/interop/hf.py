"""What this project needs to know of transformers' names, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from overhaul import models
from overhaul.errors import UserError
from overhaul.layers import LinearLike

# Configurations that change the logits after the output embedding; those models keep their own forward.
_LOGIT_CHANGES = (
    "final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale", "lm_head_multiplier",
    "logits_soft_cap", "output_logit_soft_cap",
)  # fmt: skip

SAME_STATE = 0.05
"""How far apart, over their norm, two states of one token can be by rounding in bf16; other text before moves more."""


class Head(NamedTuple):
    """The output embedding: `weight` (V, D) and an optional `bias` (V,)."""

    weight: Tensor
    bias: Tensor | None


def body(model: nn.Module) -> nn.Module:
    """The decoder without the output embedding.

    Raises:
        UserError: there are two.
    """
    refuse_two(model)
    inner: Any = model
    return inner.base_model


def refuse_two(model: Any, name: str = "") -> None:
    """Raises `UserError` for a model whose logits are made of those of two networks.

    Args:
        model: it, or its configuration.
        name: how the user called it.
    """
    if models.is_of_two(model):
        raise UserError(
            f"{name or type(model).__name__} is two networks, whose logits are subtracted (forget whp): neither "
            "weights nor hidden states are those of one",
            allowed="what asks for logits alone",
            hint="the model it was made from",
        )


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
    if states:
        refuse_two(model)
    runs: Any = body(model) if has_linear_head(model) else model
    more = {"output_hidden_states": True} if states else {}
    made = runs(**_inputs(batch), use_cache=False, **more)
    kept = made.hidden_states if states else None
    return Outputs(None, made.logits, kept) if runs is model else Outputs(made.last_hidden_state, None, kept)


def mean_states(model: nn.Module, ids: Sequence[Tensor]) -> Tensor:
    """`(B, D)` float32: the mean of each text's last hidden states.

    Args:
        model: a causal language model, which does not look at what texts are filled up with on the right.
        ids: tokens of each text, `(T,)`, at least one.
    """
    device = next(model.parameters()).device
    lengths_B1 = torch.tensor([[len(one)] for one in ids], device=device)
    ids_BT = nn.utils.rnn.pad_sequence(list(ids), batch_first=True).to(device)
    inside_BT = torch.arange(ids_BT.shape[1], device=device) < lengths_B1
    return mean_inside(hidden_states(model, {"input_ids": ids_BT}).float(), inside_BT)


def mean_inside(states_BTD: Tensor, inside_BT: Tensor) -> Tensor:
    """`(B, D)`: the mean over a text's own places."""
    return (states_BTD * inside_BT[..., None]).sum(1) / inside_BT.sum(1, keepdim=True)


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """`(B, T, V)` of a causal language model, with the output embedding's effective weight."""
    made, embedding = outputs(model, batch), head(model)
    if embedding is None or made.hidden is None:
        assert made.logits is not None
        return made.logits
    return nn.functional.linear(made.hidden, embedding.weight, embedding.bias)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    words = "inputs_embeds" if "inputs_embeds" in batch else "input_ids"
    return {name: batch[name] for name in (words, "attention_mask", "position_ids") if name in batch}


@torch.no_grad()
def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether positions that begin anew within a window end attention and all other memory there.

    It is tried out: two windows of two documents each, cut at different places, against the documents alone. Not every
    model that takes `position_ids` heeds them.

    Args:
        model: in evaluation mode.
    """
    takes: Any = signature(body(model).forward).parameters.values()
    if not any(one.name == "position_ids" or one.kind is one.VAR_KEYWORD for one in takes):
        return False
    device, sizes = next(model.parameters()).device, ((7, 12), (11, 8))
    ids_BT = torch.arange(2, 40, device=device).view(2, -1) % num_words(model.config)
    positions_BT = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes]).to(device)
    packed_BTX = _last(outputs(model, {"input_ids": ids_BT, "position_ids": positions_BT}))
    alone = [
        torch.cat([_last(outputs(model, {"input_ids": part[None]}))[0] for part in ids_T.split(row)])
        for ids_T, row in zip(ids_BT, sizes, strict=True)
    ]
    wanted_BTX = torch.stack(alone).float()
    off_BT = (packed_BTX.float() - wanted_BTX).norm(dim=-1) / wanted_BTX.norm(dim=-1)
    return bool(off_BT.max() < SAME_STATE)


def _last(made: Outputs) -> Tensor:
    return made.logits if made.hidden is None else made.hidden  # pyright: ignore[reportReturnType]


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
