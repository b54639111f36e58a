"""A really smaller decoder: the elements that stay are sliced out of every parameter, nothing is approximated.

Letters of shapes: L layers kept, D hidden channels kept, F neurons kept, G groups kept, K query heads kept in a group.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from overhaul.interop import decoder as decoders
from overhaul.interop.decoder import Decoder
from overhaul.layers import swap
from overhaul.layers.masked import MaskedLinear
from overhaul.shapes import Axis, Shape

_MOVED = (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")
"""What the head residual changes: with groups only the first, for the heads of a group share keys and values."""

NOBODY = -1
"""In `Kept.partners_LGK`: this head takes nothing over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What stays, by its number in the source and in the order in which it will stand; all int64.

    Attributes:
        layers_L: blocks.
        hidden_D: channels of the residual stream, the same in all layers.
        ffn_LF: neurons of each kept layer.
        groups_LG: groups of query heads of each kept layer.
        heads_LGK: query heads of each kept group.
        partners_LGK: the head that is removed in favour of each kept one (head residual), `NOBODY` for none.
    """

    layers_L: Tensor
    hidden_D: Tensor
    ffn_LF: Tensor
    groups_LG: Tensor
    heads_LGK: Tensor
    partners_LGK: Tensor | None = None

    @classmethod
    def everything(cls, shape: Shape) -> Kept:
        """Nothing is cut."""
        layers, groups = shape.layers, shape.kv_groups
        return cls(
            layers_L=torch.arange(layers),
            hidden_D=torch.arange(shape.hidden),
            ffn_LF=torch.arange(shape.ffn).repeat(layers, 1),
            groups_LG=torch.arange(groups).repeat(layers, 1),
            heads_LGK=torch.arange(shape.heads).view(groups, -1).repeat(layers, 1, 1),
        )

    @property
    def shape(self) -> Shape:
        """How large the result is."""
        layers, groups, each = self.heads_LGK.shape
        return Shape(
            layers=layers,
            hidden=len(self.hidden_D),
            ffn=self.ffn_LF.shape[1],
            heads=groups * each,
            kv_groups=groups,
        )


@torch.no_grad()
def cut(model: nn.Module, kept: Kept) -> nn.Module:
    """A new model of what is kept; `model` stays as it is, and shares no memory with the result.

    It is built from its own configuration, as transformers builds it from disk: layers are numbered anew, positions
    and tied embeddings are those of a stock model. Masks are cut along with their weights.

    Raises:
        UserError: a model whose parts are not known, or a shape that no stock configuration holds.
    """
    found = decoders.find(model)
    smaller = _empty(found, kept)
    moved = _MOVED if found.shape.heads == found.shape.kv_groups else _MOVED[:1]
    state = {}
    sources = _sources(found, smaller, kept)
    for name, (source, layer) in sources.items():
        parameter = model.get_parameter(source)
        if kept.partners_LGK is not None and any(projection in source for projection in moved):
            parameter = with_residual(parameter, kept, layer, found.architecture.head_dim)
        state[name] = _sliced(parameter, found, source, kept, layer)
    smaller.load_state_dict(state, strict=False, assign=True)
    inner: Any = smaller
    inner.tie_weights()  # the embedding is another tensor now
    for name, (source, layer) in sources.items():
        old = model.get_submodule(source.rpartition(".")[0])
        if isinstance(old, MaskedLinear) and source.endswith(".weight"):
            mask_OI = _sliced(old.mask, found, source, kept, layer)
            swap(smaller, [name.removesuffix(".weight")], lambda new, mask=mask_OI: _masked(new, mask))
    inner.generation_config = copy.deepcopy(cast("Any", model).generation_config)
    return smaller.to(next(model.parameters()).device).train(model.training)


def _empty(found: Decoder, kept: Kept) -> nn.Module:
    """The smaller model with its buffers, and parameters that were never written."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = decoders.config_of(found, kept.shape, kept.layers_L.tolist())
    with no_init_weights():
        smaller: Any = AutoModelForCausalLM.from_config(config, dtype=next(found.model.parameters()).dtype)
    smaller.tie_weights()
    return smaller


def _sources(found: Decoder, smaller: nn.Module, kept: Kept) -> dict[str, tuple[str, int]]:
    """For each parameter of the result the one it is cut out of, and the place of its layer among those kept."""
    sources = {}
    for name, _ in smaller.named_parameters():
        if not name.startswith(f"{found.prefix}."):
            sources[name] = (name, 0)
            continue
        number, _, own = name.removeprefix(f"{found.prefix}.").partition(".")
        sources[name] = (f"{found.prefix}.{int(kept.layers_L[int(number)])}.{own}", int(number))
    return sources


def _sliced(tensor: Tensor, found: Decoder, source: str, kept: Kept, layer: int) -> Tensor:
    """The elements of a parameter, or of its mask, that stay."""
    cut_along: list[tuple[int, Axis]] = [(dim, axis) for dim, axis in enumerate(found.axes[source]) if axis is not None]
    if not cut_along:  # the norms of queries and keys, which run over one head
        return tensor.detach().clone()
    for dim, axis in cut_along:
        stays = rows(kept, axis, layer, found.architecture.head_dim)
        tensor = tensor.detach().index_select(dim, stays.to(tensor.device))
    return tensor


def rows(kept: Kept, axis: Axis, layer: int, head_dim: int) -> Tensor:
    """The numbers of what stays along an axis, entry by entry."""
    if axis == "hidden":
        return kept.hidden_D
    if axis == "ffn":
        return kept.ffn_LF[layer]
    heads = kept.heads_LGK[layer].flatten() if axis == "query" else kept.groups_LG[layer]
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def with_residual(projection: Tensor, kept: Kept, layer: int, head_dim: int) -> Tensor:
    """A projection to heads, weight or bias, in which each kept head has moved away from its removed partner.

    head_i <- head_i + (head_i - head_partner), of the source's numbering; all others are as they were.
    """
    assert kept.partners_LGK is not None
    heads, partners = kept.heads_LGK[layer].flatten(), kept.partners_LGK[layer].flatten()
    heads, partners = heads[partners != NOBODY], partners[partners != NOBODY]
    before = projection.detach().unflatten(0, (-1, head_dim))
    after = before.clone()
    after[heads] = 2 * before[heads] - before[partners]
    return after.flatten(0, 1)


def _masked(linear: nn.Module, mask_OI: Tensor) -> MaskedLinear:
    return MaskedLinear.from_linear(cast("nn.Linear", linear), mask_OI)
