"""What this project needs to know of transformers' names, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

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


def hidden_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Last hidden states `(B, T, D)` of a causal language model."""
    mask = batch.get("attention_mask")
    inputs = {"input_ids": batch["input_ids"], **({} if mask is None else {"attention_mask": mask})}
    return body(model)(**inputs, use_cache=False).last_hidden_state


def head(model: nn.Module) -> Head | None:
    """The output embedding's effective weight, or None when the logits are more than a linear map."""
    outer: Any = model
    if any(getattr(outer.config, name, None) not in (None, 1, 1.0) for name in _LOGIT_CHANGES):
        return None
    if hasattr(outer, "head"):  # ModernBERT's decoders have a layer between the body and the output embedding
        return None
    layer = outer.get_output_embeddings()
    if isinstance(layer, LinearLike):
        return Head(layer.dense(), layer.bias)
    return Head(layer.weight, layer.bias) if isinstance(layer, nn.Linear) else None


def unchunked_cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed next-token cross-entropy through the model's own logits."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits_BTV = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels_N = batch["labels"][:, 1:].reshape(-1)
    return F.cross_entropy(logits_BTV.reshape(-1, logits_BTV.shape[-1]), labels_N, reduction="sum")
