"""A decoder's weights as they lie in a directory, read one at a time: linear layers, and all that is beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from overhaul import artifact as artifacts
from overhaul.errors import UserError
from overhaul.interop import hf
from overhaul.interop.peft import CONFIG, plain_lora, why_not_plain
from overhaul.lineage import LineageStep, Parent
from overhaul.matrices import Listed, manifest
from overhaul.select import block_linears, outermost_linears, shapes_of


@dataclass(frozen=True, slots=True)
class Stored:
    """What a directory holds.

    Attributes:
        name: how the user called it.
        path: the directory.
        shapes: (O, I) of every linear layer of the blocks by qualified name.
        read: gives the weight of a layer in fp32, with adapters merged, or the parameter that is called so among
            `others`; `UserError` where it is not finite.
        others: shapes of all other parameters by qualified name: embeddings, a head of its own, norms, biases.
    """

    name: str
    path: Path
    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[str], Tensor]
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def stored(ref: str) -> Stored:
    """Opens a model directory or an adapter's.

    Weights are read from safetensors, one tensor at a time, also under a plain LoRA adapter. Whatever lies on disk in
    another form (packed integers, other adapters, other names) is loaded as a whole.
    """
    artifacts.check_files(ref)
    path, base = artifacts.directories(ref)
    config = artifacts.read_config(ref)
    hf.refuse_two(config, ref)
    shapes = _shapes(ref)
    others = _others(ref, shapes)
    names = {*others, *(f"{name}.weight" for name in shapes)}
    files = {key: file for file in artifacts.weight_files(base) for key in _keys(file)}
    is_adapter = path != base
    is_packed = getattr(config, "quantization_config", None) is not None
    if is_packed or not names <= files.keys() or (is_adapter and why_not_plain(path)):
        return _loaded(ref, path, others)
    lora = plain_lora(path) if is_adapter else None

    def read(name: str) -> Tensor:
        key = name if name in others else f"{name}.weight"
        with safe_open(files[key], framework="pt") as opened:
            weight_OI = opened.get_tensor(key).float()
        if lora and name in lora.factors:
            A_RI, B_OR = lora.factors[name]
            weight_OI.addmm_(B_OR, A_RI, alpha=lora.scale)
        return weight_OI

    return Stored(ref, path, shapes, _finite(read, ref, others), others)


def listed(ref: str) -> tuple[Listed, ...]:
    """Every parameter of a directory's model, its block and what it is for, without values."""
    return manifest(_empty(ref))


def _empty(ref: str) -> nn.Module:
    """The model without values, which takes no memory."""
    from transformers import AutoModelForCausalLM

    config = artifacts.read_config(ref)
    artifacts.check_kind(config, ref)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _keys(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return []
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _loaded(ref: str, path: Path, others: Mapping[str, tuple[int, ...]]) -> Stored:
    model = artifacts.load(ref, dtype=torch.float32).model
    layers = outermost_linears(model)

    def read(name: str) -> Tensor:
        holder, _, leaf = name.rpartition(".") if name in others else (name, "", "weight")
        module: Any = model.get_submodule(holder)
        dense: Any = getattr(module, "dense", None) if leaf == "weight" else None
        return (dense() if dense else getattr(module, leaf)).detach().float()

    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    return Stored(ref, path, shapes, _finite(read, ref, others), others)


def _finite(read: Callable[[str], Tensor], ref: str, others: Mapping[str, tuple[int, ...]]) -> Callable[[str], Tensor]:
    def checked(name: str) -> Tensor:
        weight_OI = read(name)
        if not weight_OI.isfinite().all():
            bad, key = int((~weight_OI.isfinite()).sum()), name if name in others else f"{name}.weight"
            raise UserError(
                f"{ref}: tensor {key} has {bad} values that are NaN or infinite",
                hint="a sound copy of the model",
            )
        return weight_OI

    return checked


def refuse_other_base(base: Stored, tuned: Stored) -> None:
    """Raises `UserError` where one model cannot have been made from the other, as far as that shows."""
    odd = [
        f"{name}: {base.shapes.get(name, 'missing')} and {tuned.shapes.get(name, 'missing')}"
        for name in dict.fromkeys([*base.shapes, *tuned.shapes])
        if base.shapes.get(name) != tuned.shapes.get(name)
    ]
    if odd:
        raise UserError(
            f"{tuned.name} has other layers than {base.name}: {'; '.join(odd[:3])}"
            + (f", and {len(odd) - 3} more" if len(odd) > 3 else ""),
            allowed="a model and what it was trained from, with layers of the same names and shapes",
        )
    own = artifacts.directories(tuned.name)[1]
    if own == tuned.path:
        return
    if not _is_as_it_was(own, tuned.path):
        raise UserError(
            f"{tuned.name} is an adapter of {own}, whose weights were changed since", hint="the model as it was"
        )
    if not own.samefile(base.path) and artifacts.weights_sha256(own) != artifacts.weights_sha256(base.path):
        raise UserError(f"{tuned.name} is an adapter of other weights than those of {base.name}", hint=str(own))


def base_of(ref: str) -> str | None:
    """What a model was made from, if it is still there as it was: an adapter's base, or where its lineage began.

    Of a lineage the first model counts that has layers of the same shapes.
    """
    path, own = artifacts.directories(ref)
    if own != path:
        return str(own) if _is_as_it_was(own, path) else None
    begun: list[Parent] = [step.parents[0] for step in lineage_of(path) if step.parents]
    if not begun:
        return None
    shapes = _shapes(ref)
    for parent in begun:
        at = artifacts.unchanged(parent)
        if at is not None and not (at / CONFIG).is_file() and _shapes(str(at)) == shapes:
            return parent.path
    return None


def _is_as_it_was(base: Path, adapter: Path) -> bool:
    """Whether the base of an adapter has weights that one of its steps read; true where no record says so."""
    read = {step.parents[0].hash for step in lineage_of(adapter) if step.parents}
    return not read or artifacts.weights_sha256(base) in read


def lineage_of(path: Path) -> list[LineageStep]:
    """The steps in a directory's record; none where it has no record."""
    record = artifacts.read_record(path) if (path / artifacts.RECORD).is_file() else {}
    return [LineageStep.from_json(step) for step in record.get("lineage", ())]


def _shapes(ref: str) -> Mapping[str, tuple[int, int]]:
    model = _empty(ref)
    return shapes_of(model, block_linears(model))


def _others(ref: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    layers = {f"{name}.weight" for name in shapes}
    return {one.name: tuple(one.parameter.shape) for one in listed(ref) if one.name not in layers}
