"""int8 models on disk, in the layout of bitsandbytes: `weight` int8, `SCB` fp32, `weight_format` 0.

What bitsandbytes computes too (a constant for each token, one for each output or one for the whole weight) is written
under its name, and transformers reads it with bitsandbytes as it is. Zero points, constants of whole tensors and kept
columns it would read and compute something else: these are written under the name `overhaul-int8`, in a way that
transformers refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from overhaul.errors import UserError
from overhaul.int8 import Kind
from overhaul.layers import swap
from overhaul.layers.int8 import Int8Linear

OURS = "overhaul-int8"
THEIRS = "bitsandbytes"


def refuse(settings: Mapping[str, Any]) -> None:
    """Raises `UserError` for bitsandbytes' other formats."""
    if settings.get("format") == OURS:
        return
    if settings.get("load_in_4bit") or not settings.get("load_in_8bit"):
        raise UserError(
            "the model is quantized by bitsandbytes to 4 bit: its NF4 and FP4 blocks are not read",
            allowed="bitsandbytes' 8 bit (load_in_8bit), which overhaul quantize int8 writes too",
            hint="the model it was quantized from",
        )
    if settings.get("llm_int8_has_fp16_weight"):
        raise UserError("the model says llm_int8_has_fp16_weight: its weights are not int8 yet", hint="false there")


def layers(model: nn.Module, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replaces the linear layers whose constants are in the files by empty int8 layers.

    Raises:
        UserError: such a layer is none of the model's linear layers.
    """
    kind = _kind(settings)
    found = dict(model.named_modules())
    for tensor in shapes:
        name, _, last = tensor.rpartition(".")
        if last != "SCB":
            continue
        if type(found.get(name)) is not nn.Linear:
            raise UserError(f"{tensor} is stored, but {name} is no linear layer of {type(model).__name__}")
        num_columns = shapes.get(f"{name}.outlier_columns", (0,))[0]
        swap(model, [name], lambda linear, count=num_columns: Int8Linear.empty(linear, kind, count))


def _kind(settings: Mapping[str, Any]) -> Kind:
    if settings.get("quant_method") == THEIRS:
        return Kind(threshold=float(settings.get("llm_int8_threshold", 6.0)))
    return Kind(**{name: settings[name] for name in ("threshold", "granularity", "zero_point")})


def settings(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a model with int8 layers; all linear layers that are none are named in it."""
    made = [module for module in model.modules() if isinstance(module, Int8Linear)]
    kind = made[0].kind
    skipped = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if all(is_theirs(layer) for layer in made):
        return {
            "quant_method": THEIRS,
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": kind.threshold,
            "llm_int8_skip_modules": skipped,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }
    return {
        "format": OURS,
        "threshold": kind.threshold,
        "granularity": kind.granularity,
        "zero_point": kind.zero_point,
        "skip": skipped,
    }


def is_theirs(layer: Int8Linear) -> bool:
    """Whether bitsandbytes computes the same from the layer's tensors."""
    return not layer.kind.zero_point and layer.kind.granularity != "tensor" and layer.outlier_columns is None
