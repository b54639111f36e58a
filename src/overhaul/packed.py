"""Models whose weights lie on disk as integers or as factors: how they are read, and written again.

`config.json` says under `quantization_config` which format it is: by `quant_method` where transformers reads it too,
by `format` where only this project does. transformers refuses a configuration without `quant_method`; by an unknown
one it would be misled, with a warning, to take the integers for weights. Each format is a module with three functions:

    refuse(settings)                   raises `UserError` for variants that this project does not read
    layers(model, settings, shapes)    replaces modules of an uninitialised model by packed ones, in place; the shapes
                                       are those of the tensors in the files, by name
    settings(model)                    what `quantization_config` says of a model with packed layers
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from overhaul.errors import UserError
from overhaul.layers import Packed

FORMATS = {
    "bct": "overhaul.bct.format",
    "bitsandbytes": "overhaul.interop.bitsandbytes",
    "overhaul-int8": "overhaul.interop.bitsandbytes",
    "sltrain": "overhaul.factored",
}
"""`quant_method` or `format` -> the module that knows it."""


SCALES = (".scale", ".SCB")
"""Ends of the names of tensors that say what integers stand for: they have a type of their own."""

SHARD = "5GB"
"""Largest weight file."""


def is_packed(model: nn.Module) -> bool:
    """Whether some weights of the model are stored in a form of their own."""
    return any(isinstance(module, Packed) for module in model.modules())


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights of the model are stored as integers."""
    return any(isinstance(module, Packed) and module.stores_integers for module in model.modules())


def trains_adapters(model: nn.Module) -> bool:
    """Whether adapters can be trained on top of the packed modules of a model."""
    return all(module.trains_adapters for module in model.modules() if isinstance(module, Packed))


def format_of(settings: Mapping[str, Any]) -> str:
    """What a `quantization_config` calls its format."""
    return str(settings.get("quant_method") or settings.get("format") or "unknown")


def check(settings: Mapping[str, Any], ref: str) -> None:
    """Raises `UserError` for a `quantization_config` that this project cannot read."""
    how = format_of(settings)
    if how not in FORMATS:
        raise UserError(
            f"{ref} is quantized ({how}), which overhaul does not read",
            allowed=", ".join(["dense weights", *FORMATS]),
            hint="the model it was quantized from",
        )
    import_module(FORMATS[how]).refuse(settings)


def refuse_unmarked(path: Path, ref: str) -> None:
    """Raises `UserError` for packed weights of which `config.json` says nothing: as numbers they would be nonsense."""
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            weights = [name for name in opened.keys() if name.endswith(".weight")]  # noqa: SIM118 - not a dict
            found = next((name for name in weights if opened.get_slice(name).get_dtype() in ("I8", "U8")), None)
        if found:
            raise UserError(
                f"{ref} holds weights as integers ({found}), and its config.json has no quantization_config",
                hint="the config.json that was written with the weights",
            )


def read(path: Path, settings: Mapping[str, Any], dtype: torch.dtype | None, ref: str) -> nn.Module:
    """The model in a directory with packed weights.

    Args:
        path: the directory; its `quantization_config` has passed `check`.
        settings: that `quantization_config`.
        dtype: of the weights that are not packed; None keeps that on disk.
        ref: how the user called it.

    Raises:
        UserError: tensors are missing, or not of the shape that the configuration says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
    stored = dict(config.quantization_config)
    del config.quantization_config  # transformers would look for its own quantizer
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    tensors = _tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    import_module(FORMATS[format_of(settings)]).layers(model, settings, shapes)
    _load(model, tensors, ref)
    model.tie_weights(recompute_mapping=False)  # what a format keeps in another way is no longer in the mapping
    model.config.quantization_config = stored
    return model.eval()


def write(model: nn.Module, directory: Path) -> None:
    """Writes weights and configuration of a model with packed layers; the rest of a directory is the caller's."""
    inner: Any = model
    config, generation = inner.config, inner.generation_config
    packing = import_module(FORMATS[format_of(config.quantization_config)])
    config.quantization_config = packing.settings(model)
    state = model.state_dict()
    tied = _tied(model)
    tensors = {name: tensor.contiguous() for name, tensor in state.items() if name not in tied}
    _save_shards(tensors, directory)
    config.architectures, config.dtype = [type(model).__name__], inner.dtype
    config.save_pretrained(directory)
    generation.save_pretrained(directory)


def _save_shards(tensors: Mapping[str, Tensor], directory: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(tensors), directory, max_shard_size=SHARD, metadata={"format": "pt"})


def _tensors(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    return found


def _tied(model: nn.Module) -> set[str]:
    """The tensors that are another one under a second name, and so not in the files."""
    inner: Any = model
    return set(getattr(inner, "all_tied_weights_keys", None) or {}) if inner.config.tie_word_embeddings else set()


def _load(model: nn.Module, tensors: dict[str, Tensor], ref: str) -> None:
    """Puts tensors in the place of the uninitialised ones; every one that is not tied must be there."""
    tied, expected = _tied(model), model.state_dict()
    for name, wanted in expected.items():
        if name in tied:
            continue
        if name not in tensors:
            raise UserError(f"{ref}: tensor {name} is missing from the weight files", hint="a sound copy of the model")
        if tensors[name].shape != wanted.shape:
            raise UserError(
                f"{ref}: tensor {name} is {tuple(tensors[name].shape)} in the file and {tuple(wanted.shape)} by "
                "config.json",
                hint="a sound copy of the model",
            )
        if tensors[name].is_floating_point() != wanted.is_floating_point():
            raise UserError(
                f"{ref}: tensor {name} is {tensors[name].dtype} in the file and {wanted.dtype} by config.json",
                hint="a sound copy of the model",
            )
        if wanted.is_floating_point():
            tensors[name] = tensors[name].to(wanted.dtype)
    model.load_state_dict({name: tensors[name] for name in expected if name in tensors}, strict=False, assign=True)
