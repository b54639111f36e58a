"""What is where in a Llama-like decoder: its projections by name, its shape, and a configuration of another shape.

A family is one table: a parameter's name -> the axes that its dimensions run along. Cutting, counting and scoring read
that table; a new family is a new line in `FAMILIES`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from overhaul.errors import UserError
from overhaul.interop import hf
from overhaul.shapes import Architecture, Axis, Shape

_PER_LAYER = ("layer_types", "no_rope_layers")
"""Lists in configurations with one entry for each layer."""

Names = dict[str, tuple[Axis | None, ...]]
"""Parameter -> axes; None is a dimension that is never cut."""

ATTENTION, MLP = "self_attn.o_proj", "mlp.down_proj"
"""The projections that read the heads, and the neurons."""
NORMS = ("input_layernorm", "post_attention_layernorm")
"""What reads the residual stream in a block."""

_LLAMA: Names = {
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.weight": ("key", "hidden"),
    "self_attn.k_proj.bias": ("key",),
    "self_attn.v_proj.weight": ("key", "hidden"),
    "self_attn.v_proj.bias": ("key",),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "self_attn.o_proj.bias": ("hidden",),
    "self_attn.q_norm.weight": (None,),
    "self_attn.k_norm.weight": (None,),
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.gate_proj.bias": ("ffn",),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.bias": ("ffn",),
    "mlp.down_proj.weight": ("hidden", "ffn"),
    "mlp.down_proj.bias": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
}
_OUTSIDE: Names = {
    "embed_tokens.weight": (None, "hidden"),
    "norm.weight": ("hidden",),
    "lm_head.weight": (None, "hidden"),
}

FAMILIES: dict[str, Names] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "arcee"), _LLAMA)
"""`model_type` -> names, of the models whose residual stream is scaled by nothing but its norms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A model with what is known of its parts.

    Attributes:
        model: the causal language model.
        prefix: the qualified name of its list of blocks.
        shape: how large it is.
        architecture: what cutting does not change.
        axes: the axes of every parameter, by its qualified name.
    """

    model: nn.Module
    prefix: str
    shape: Shape
    architecture: Architecture
    axes: dict[str, tuple[Axis | None, ...]]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, first to last."""
        return list(self.model.get_submodule(self.prefix).children())


def find(model: nn.Module) -> Decoder:
    """The parts of a Llama-like model.

    Raises:
        UserError: a class whose projections are not known, with those that were found; or blocks of different
            widths, which no stock configuration can say.
    """
    inner: Any = model
    config = inner.config
    names = FAMILIES.get(config.model_type)
    if names is None:
        raise _unknown(model)
    prefix = f"{_name_of(model, hf.body(model))}.layers"
    shape = Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_groups=config.num_key_value_heads,
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    axes, block, outside = {}, {}, {}
    for name, parameter in model.named_parameters():
        is_inside, own = name.startswith(f"{prefix}."), _plain(name)
        of = (names if is_inside else _OUTSIDE).get(own)
        if of is None:
            raise _unknown(model, name)
        axes[name] = of
        # Blocks are alike, or refused below: each writes over the one before.
        (block if is_inside else outside)[own] = tuple(
            axis or size for axis, size in zip(of, parameter.shape, strict=True)
        )
    architecture = Architecture(head_dim=head_dim, block=block, outside=outside)
    found = Decoder(model=model, prefix=prefix, shape=shape, architecture=architecture, axes=axes)
    _refuse_uneven(found)
    return found


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _unknown(model: nn.Module, parameter: str = "") -> UserError:
    """The error for a class whose parts are not known, with what was found."""
    linears = {_plain(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    what = f" has {parameter}, and it" if parameter else ""
    return UserError(
        f"{type(model).__name__}{what} cannot be cut: which of its projections belong together is not known. "
        f"Linear layers found: {', '.join(sorted(linears)) or 'none'}",
        allowed=f"models of type {', '.join(FAMILIES)}",
    )


def _plain(name: str) -> str:
    """The name below its block, or below the body: `self_attn.q_proj.weight`, `embed_tokens.weight`."""
    inside = re.search(r"\.\d+\.", name)
    return name[inside.end() :] if inside else name.removeprefix("model.")


def _refuse_uneven(decoder: Decoder) -> None:
    """Raises `UserError` unless every parameter is as large as the configuration says."""
    sizes = decoder.architecture.sizes(decoder.shape)
    for name, parameter in decoder.model.named_parameters():
        for axis, size in zip(decoder.axes[name], parameter.shape, strict=True):
            if axis is not None and size != sizes[axis]:
                raise UserError(
                    f"{name} is {tuple(parameter.shape)}, and the configuration says {axis} {sizes[axis]}: a stock "
                    "configuration holds one width for all blocks",
                    allowed="models whose blocks are all alike",
                )


def config_of(decoder: Decoder, shape: Shape, layers: Sequence[int]) -> Any:
    """The configuration of the model cut to `shape`, keeping these layers.

    `LlamaConfig` refuses a hidden size that its heads do not divide, though nothing computes with their quotient once
    `head_dim` is written down. Such a shape becomes a `MistralConfig`, which computes the same.

    Raises:
        UserError: no stock configuration says this shape.
    """
    inner: Any = decoder.model
    source = inner.config
    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_groups,
        "head_dim": decoder.architecture.head_dim,
    }
    fields = copy.deepcopy(source.to_dict())
    for name in _PER_LAYER:
        if fields.get(name) is not None:
            fields[name] = [fields[name][layer] for layer in layers]
    fields |= sizes
    config = _valid(type(source), fields)
    if config is None and source.model_type == "llama" and not (source.attention_bias or source.mlp_bias):
        from transformers import MistralConfig

        without = (
            "attention_bias",
            "mlp_bias",
            "pretraining_tp",
            "model_type",
            "architectures",
            "transformers_version",
        )
        kept = {name: value for name, value in fields.items() if name not in without}
        config = _valid(MistralConfig, {**kept, "sliding_window": None})
    if config is None:
        raise UserError(
            f"{type(source).__name__} of transformers cannot say {shape}: it wants a hidden size that the heads divide",
            allowed=f"--hidden a multiple of {shape.heads}, or another number of heads",
        )
    config._attn_implementation = source._attn_implementation
    return config


def can_say(decoder: Decoder, shape: Shape) -> bool:
    """Whether a stock configuration holds the shape."""
    try:
        config_of(decoder, shape, range(shape.layers))
    except UserError:
        return False
    return True


def _valid(kind: type[Any], fields: dict[str, Any]) -> Any:
    """The configuration, or None where its class refuses the shape."""
    from huggingface_hub.errors import StrictDataclassClassValidationError

    try:
        return kind.from_dict(fields)
    except StrictDataclassClassValidationError:
        return None
