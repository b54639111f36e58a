"""PEFT's adapter directories: written from our adapters, and read back into a model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from overhaul.errors import UserError
from overhaul.layers import Adapter, merge_all, swap
from overhaul.layers.lora import LoRALinear, PackedLoRALinear
from overhaul.layers.randlora import RandLoRALinear
from overhaul.layers.vera import VeRALinear
from overhaul.random_bases import RandLoRABases, VeRABases

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHECKSUM = "bases_sha256"
"""Metadata of the tensors: which random bases they belong to. PEFT does not look at it."""
_ROOT = "base_model.model."

Layers = Mapping[str, Any]
Written = tuple[Any, dict[str, Tensor], dict[str, str]]
"""A PEFT configuration, tensors, and metadata."""


def write_adapter(model: nn.Module, base: Path, directory: Path) -> None:
    """Writes the adapters as `adapter_model.safetensors` and `adapter_config.json`, as `peft` loads them.

    Args:
        model: holds adapters of one kind, all of one rank.
        base: the directory of the model that they belong to.
        directory: where to write.
    """
    from safetensors.torch import save_file

    layers: Layers = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    how = next(write for kind, write in _WRITERS.items() if isinstance(next(iter(layers.values())), kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft warns of bases that are drawn again from their key
        config, tensors, metadata = how(layers)
    config.target_modules = _targets(model, layers)
    config.bias, config.task_type, config.inference_mode = "none", "CAUSAL_LM", True
    config.base_model_name_or_path = str(base.resolve())
    config.save_pretrained(str(directory))
    stored = {f"{_ROOT}{name}": tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(stored, directory / TENSORS, metadata={"format": "pt", **metadata})


def _targets(model: nn.Module, layers: Layers) -> list[str]:
    """Ends of names where they mean exactly these layers, else whole names."""
    ends = {name.rsplit(".", 1)[-1] for name in layers}
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends if meant == set(layers) else layers)


def _lora(layers: Layers) -> Written:
    from peft import LoraConfig

    first = next(iter(layers.values()))
    config = LoraConfig(r=first.rank, lora_alpha=first.alpha, lora_dropout=first.dropout)
    tensors = {f"{name}.lora_{f}.weight": getattr(layer, f"lora_{f}") for name, layer in layers.items() for f in "AB"}
    return config, tensors, {}


def _randlora(layers: Layers) -> Written:
    from peft import RandLoraConfig

    first = next(iter(layers.values()))
    bases: RandLoRABases = first.bases
    # peft knows one scale; where layers differ, lambda takes what is left: the increment is linear in it.
    scale = max(layer.scale for layer in layers.values())
    alpha = scale * bases.rank
    config = RandLoraConfig(
        r=bases.rank,
        randlora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # pyright: ignore - peft takes a float too
        randlora_dropout=first.dropout,
        projection_prng_key=bases.key,
        save_projection=bases.saved,
        sparse=bases.kind == "sparse",
        very_sparse=bases.kind == "very_sparse",
    )
    tensors = {f"{name}.randlora_gamma": layer.randlora_gamma for name, layer in layers.items()}
    for name, layer in layers.items():
        tensors[f"{name}.randlora_lambda"] = layer.randlora_lambda * (layer.scale / scale)
    if bases.saved:  # once, in the place of the first layer's: in peft too all layers share them
        name = next(iter(layers))
        tensors |= {f"{name}.randlora_A": bases.A_Rd[:, None], f"{name}.randlora_B": bases.B_DNR}
    return config, tensors, {CHECKSUM: bases.checksum()}


def _vera(layers: Layers) -> Written:
    from peft import VeraConfig

    bases: VeRABases = next(iter(layers.values())).bases
    config = VeraConfig(r=bases.rank, projection_prng_key=bases.key, save_projection=False)
    tensors = {
        f"{name}.vera_lambda_{vector}": getattr(layer, f"vera_lambda_{vector}")
        for name, layer in layers.items()
        for vector in "bd"
    }
    return config, tensors, {CHECKSUM: bases.checksum()}


_WRITERS: dict[Any, Any] = {LoRALinear | PackedLoRALinear: _lora, RandLoRALinear: _randlora, VeRALinear: _vera}


def read_adapter(model: nn.Module, directory: Path, *, packed: bool) -> None:
    """Adds the adapter in a PEFT directory to `model`, in place: merged, or put over the layers of a packed model.

    Raises:
        UserError: its random bases are not those that it was trained with, peft cannot merge it, or this kind of
            adapter is not read over packed layers.
    """
    config = json.loads((directory / CONFIG).read_text())
    kind = str(config.get("peft_type"))
    odd = _beyond_factors(directory, config) if kind == "LORA" else [name for name in _VARIANTS if config.get(name)]
    plain = not odd and config.get("bias", "none") == "none"
    if packed and (kind not in ("LORA", "RANDLORA") or not plain):
        raise UserError(
            f"{directory}: {', '.join(odd) or kind} over quantized weights is not read",
            allowed="plain LoRA, RandLoRA",
        )
    if plain and kind in _READERS and (packed or kind != "LORA"):
        _READERS[kind](model, directory, config)
        if not packed:
            merge_all(model)
    else:
        from peft import PeftModel

        inner: Any = model
        try:
            PeftModel.from_pretrained(inner, str(directory)).merge_and_unload()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{directory} cannot be merged into its base: {error}") from error


@dataclass(frozen=True, slots=True)
class PlainLoRA:
    """Factors A (R, I) and B (O, R) by layer, in fp32, and what their product is multiplied by."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    scale: float


def why_not_plain(directory: Path) -> str:
    """What makes an adapter something else than factors of one rank and one scale; empty for a plain LoRA."""
    config = json.loads((directory / CONFIG).read_text())
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    return ", ".join(name for name in _beyond_factors(directory, config) if name != "use_rslora")


def plain_lora(directory: Path) -> PlainLoRA:
    """Reads an adapter that `why_not_plain` has nothing against, with its true scale: alpha / r, or alpha / sqrt(r)."""
    config = json.loads((directory / CONFIG).read_text())
    tensors, _ = _stored(directory)
    rank = int(config["r"])
    factors = {
        name: (tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float())
        for name in _layers_in(tensors, ".lora_A.weight")
    }
    return PlainLoRA(factors, rank, config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank))


_VARIANTS = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "layer_replication",
)  # fmt: skip


def _beyond_factors(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """What a LoRA has that is not A and B of one rank and alpha: by its configuration, and by what was trained."""
    odd = [name for name in _VARIANTS if config.get(name)]
    if config.get("bias", "none") != "none":
        odd.append(f"bias={config['bias']}")
    # Whatever peft's next variants are called, what they train has a name of its own. A head is stored as it was, too.
    plain = (".lora_A.weight", ".lora_B.weight", ".base_layer.weight")
    others = [name for name in _stored(directory)[0] if not name.endswith(plain)]
    return [*odd, *([f"{others[0]} among its tensors"] if others and not odd else [])]


def _read_lora(model: nn.Module, directory: Path, config: Mapping[str, Any]) -> None:
    tensors, _ = _stored(directory)
    for name in _layers_in(tensors, ".lora_A.weight"):
        A_RI, B_OR = (tensors[f"{name}.lora_{f}.weight"] for f in "AB")
        swap(model, [name], lambda base, A=A_RI, B=B_OR: PackedLoRALinear(base, A, B, float(config["lora_alpha"])))


def _read_randlora(model: nn.Module, directory: Path, config: Mapping[str, Any]) -> None:
    tensors, metadata = _stored(directory)
    names = _layers_in(tensors, ".randlora_lambda")
    key, rank = int(config["projection_prng_key"]), int(config["r"])
    kind = "sparse" if config.get("sparse") else "very_sparse" if config.get("very_sparse") else "dense"
    A_R1d, B_DNR = _stored_once(tensors, ".randlora_A"), _stored_once(tensors, ".randlora_B")
    if A_R1d is not None and B_DNR is not None:
        bases = RandLoRABases(A_R1d[:, 0], B_DNR, key=key, kind=kind, saved=True)
    else:
        bases = RandLoRABases.draw(_shapes(model, names), rank, key=key, kind=kind)
    _refuse_other(bases, metadata, directory)
    for name in names:
        own = tensors[f"{name}.randlora_lambda"], tensors[f"{name}.randlora_gamma"]
        swap(model, [name], lambda old, own=own: RandLoRALinear(old, bases, *own, config["randlora_alpha"] / rank))


def _read_vera(model: nn.Module, directory: Path, config: Mapping[str, Any]) -> None:
    tensors, metadata = _stored(directory)
    names, key = _layers_in(tensors, ".vera_lambda_b"), int(config["projection_prng_key"])
    A_RI, B_OR = _stored_once(tensors, ".vera_A"), _stored_once(tensors, ".vera_B")
    if A_RI is not None and B_OR is not None:
        bases = VeRABases(A_RI, B_OR, key=key)
    else:
        bases = VeRABases.draw(_shapes(model, names), int(config["r"]), key=key)
    _refuse_other(bases, metadata, directory)
    for name in names:
        own = tensors[f"{name}.vera_lambda_b"], tensors[f"{name}.vera_lambda_d"]
        swap(model, [name], lambda old, own=own: VeRALinear(old, bases, *own))


_READERS = {"LORA": _read_lora, "RANDLORA": _read_randlora, "VERA": _read_vera}


def _stored(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the names of this project's modules, and their metadata."""
    from safetensors import safe_open

    with safe_open(directory / TENSORS, framework="pt") as stored:
        return {key.removeprefix(_ROOT): stored.get_tensor(key) for key in stored.keys()}, stored.metadata() or {}  # noqa: SIM118


def _layers_in(tensors: Mapping[str, Tensor], end: str) -> list[str]:
    return [key.removesuffix(end) for key in tensors if key.endswith(end)]


def _stored_once(tensors: Mapping[str, Tensor], end: str) -> Tensor | None:
    """What all layers share, which peft may store with each of them."""
    return next((tensor for key, tensor in tensors.items() if key.endswith(end)), None)


def _shapes(model: nn.Module, names: list[str]) -> list[tuple[int, int]]:
    layers: list[Any] = [model.get_submodule(name) for name in names]
    return [(layer.out_features, layer.in_features) for layer in layers]


def _refuse_other(bases: RandLoRABases | VeRABases, metadata: Mapping[str, str], directory: Path) -> None:
    """Raises `UserError` for random bases that are not those of the training, as far as that is known."""
    found = bases.checksum()
    if metadata.get(CHECKSUM, found) != found:
        raise UserError(
            f"{directory}: the random bases drawn from key {bases.key} are not those that the adapter was trained "
            "with; this build of torch draws other numbers, or the base model has other layers",
            hint="--save-bases where it is trained",
        )
