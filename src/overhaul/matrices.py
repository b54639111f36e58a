"""What a model's parameters are for: attention, MLP, norms, embeddings, each listed once, with its block's number.

Methods that treat kinds of parameters differently (which half is trained, which gradients are projected) ask here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from overhaul.walk import decoder_blocks

Category = Literal["attention", "mlp", "norm", "embedding", "head", "other"]


@dataclass(frozen=True, slots=True)
class Listed:
    """One parameter of a model.

    Attributes:
        name: its qualified name; of tied parameters, the first one.
        parameter: itself.
        category: what it is for. In a block: `attention`, `norm`, and `mlp` for all else.
        block: the number of its block, counted from 0; None outside of the blocks.
        module: the qualified name of the module that holds it.
    """

    name: str
    parameter: nn.Parameter
    category: Category
    block: int | None
    module: str


def manifest(model: nn.Module) -> tuple[Listed, ...]:
    """Every parameter once, in the model's order; a tied one stands where it comes first.

    Raises `UserError` where the model has no decoder blocks.
    """
    blocks = {f"{prefix}.": number for number, prefix in enumerate(decoder_blocks(model))}
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    inner: Any = model
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    found = []
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        block = next((number for prefix, number in blocks.items() if name.startswith(prefix)), None)
        if module in norms:
            category: Category = "norm"
        elif block is not None:
            category = "attention" if _is_attention(name) else "mlp"
        elif embedding is not None and parameter is getattr(embedding, "weight", None):
            category = "embedding"
        elif head is not None and model.get_submodule(module) is head:
            category = "head"
        else:
            category = "other"
        found.append(Listed(name, parameter, category, block, module))
    return tuple(found)


def _is_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split("."))
