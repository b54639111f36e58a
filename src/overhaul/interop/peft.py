"""PEFT's adapter directories: written from our LoRA layers, and read back into a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from overhaul.errors import UserError
from overhaul.layers import swap
from overhaul.layers.lora import LoRALinear, PackedLoRALinear


def write_adapter(model: nn.Module, base: Path, directory: Path) -> None:
    """Writes the LoRA layers as `adapter_model.safetensors` and `adapter_config.json`, as `peft` loads them.

    Args:
        model: holds at least one LoRA layer, all of one rank and scale.
        base: the directory of the model that the adapter belongs to.
        directory: where to write.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    layers = {n: module for n, module in model.named_modules() if isinstance(module, LoRALinear | PackedLoRALinear)}
    first = next(iter(layers.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # pyright: ignore[reportArgumentType] - peft reads a float too
        lora_dropout=first.dropout,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in layers}),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.resolve()),
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().float().contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def merge_adapter(model: nn.Module, directory: Path) -> None:
    """Adds the adapter in a PEFT directory to the weights of `model`, in place."""
    from peft import PeftModel

    inner: Any = model
    PeftModel.from_pretrained(inner, str(directory)).merge_and_unload()


def attach_adapter(model: nn.Module, directory: Path) -> None:
    """Puts the adapter in a PEFT directory over the packed layers of `model`, in place; nothing is merged.

    Raises:
        UserError: it is not a plain LoRA of packed layers.
    """
    from safetensors.torch import load_file

    config = json.loads((directory / "adapter_config.json").read_text())
    odd = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
    if config.get("peft_type") != "LORA" or odd:
        raise UserError(
            f"{directory}: {', '.join(odd) or config.get('peft_type')} over quantized weights is not read",
            allowed="plain LoRA",
        )
    tensors = load_file(directory / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A_RI, B_OR = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
        swap(model, [name], lambda base, A=A_RI, B=B_OR: PackedLoRALinear(base, A, B, float(config["lora_alpha"])))
