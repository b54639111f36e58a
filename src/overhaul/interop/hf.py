"""What this project needs to know of transformers' names, in one place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.layers import LinearLike
from overhaul.layers.rms_norm import rms_norm

# Configurations that change the logits after the output embedding; those models keep their own forward.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale")


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


@contextlib.contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Inside, every RMSNorm of `model` that computes nothing else runs as one node of the graph."""
    norms = [module for module in model.modules() if _is_rms_norm(type(module))]
    for norm in norms:
        norm.forward = _fused(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward  # uncovers the class's own


def _fused(norm: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(x.dtype, norm.weight.dtype)
        return rms_norm(x, norm.weight, norm.variance_epsilon, dtype)

    return forward


@functools.cache
def _is_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether a class of that name, as Llama, Mistral, Qwen and others each have one, is the plain formula."""
    if not kind.__name__.endswith("RMSNorm"):
        return False
    norm: Any = kind(4)
    if not hasattr(norm, "variance_epsilon"):  # as Gemma's, which adds one to the weight
        return False
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 3.0]))
        probe = torch.tensor([1.0, -2.0, 0.5, 4.0])
        return torch.allclose(norm(probe), rms_norm(probe, norm.weight, norm.variance_epsilon, probe.dtype))
