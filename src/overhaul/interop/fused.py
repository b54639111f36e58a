"""While a model is worked on: what transformers writes out node by node, computed as one node of the graph each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.layers.attention import causal_attention
from overhaul.layers.master import master_linear
from overhaul.layers.rms_norm import rms_norm
from overhaul.machine import product_dtype


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Inside, the usual RMSNorms, linear layers and attention of `model`, or of a part of one, run fused.

    The results are those of the model's own code up to rounding. Attention is exchanged where models look it up by the
    name of torch's kernel, for all models of this process. What an outer `fused` has changed stays its own.
    """
    own = [module for module in model.modules() if "forward" not in vars(module)]
    changed: dict[Any, Callable[[Tensor], Tensor]] = {
        **{module: _fused_norm(module) for module in own if _is_rms_norm(type(module))},
        **{module: _fused_linear(module) for module in own if type(module).forward is nn.Linear.forward},
    }
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for module, forward in changed.items():
        module.forward = forward
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    try:
        yield
    finally:
        for module in changed:
            del module.forward  # uncovers the class's own
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa


def _fused_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = product_dtype(x) if autocast else torch.promote_types(x.dtype, norm.weight.dtype)
        return rms_norm(x, norm.weight, norm.variance_epsilon, dtype)

    return forward


def _fused_linear(linear: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = linear.weight  # asked for at each call: a sharded one is whole only then
        if weight.requires_grad and torch.is_autocast_enabled(x.device.type) and weight.dtype != product_dtype(x):
            return master_linear(x, weight, linear.bias, product_dtype(x))
        return F.linear(x, weight, linear.bias)

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


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """`sdpa`, but for plain causal attention in bf16 on a processor."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = product_dtype(query)
    usual = {"dropout": 0.0, "is_causal": None, "position_bias": None, "cache": None}
    if (
        attention_mask is None
        and all(how.get(name, default) == default for name, default in usual.items())
        and how.get("scaling") is not None
        and getattr(module, "is_causal", True)
        and query.shape[2:] == key.shape[2:] == value.shape[2:]
        and (query.device.type, dtype) == ("cpu", torch.bfloat16)
    ):
        return causal_attention(query.to(dtype), key.to(dtype), value.to(dtype), how["scaling"]), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
