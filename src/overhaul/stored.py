"""The weights of a decoder's linear layers as they lie in a directory, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from overhaul import artifact as artifacts
from overhaul.errors import UserError
from overhaul.interop.peft import CONFIG, plain_lora, why_not_plain
from overhaul.layers import LinearLike
from overhaul.lineage import LineageStep, Parent
from overhaul.select import block_linears, outermost_linears, shapes_of


@dataclass(frozen=True, slots=True)
class Stored:
    """What a directory holds: embeddings, the head and norms are left out.

    Attributes:
        name: how the user called it.
        path: the directory.
        shapes: (O, I) of every linear layer of the blocks by qualified name.
        read: gives the weight of a layer in fp32, with adapters merged; `UserError` where it is not finite.
    """

    name: str
    path: Path
    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[str], Tensor]


def stored(ref: str) -> Stored:
    """Opens a model directory or an adapter's.

    Weights are read from safetensors, one tensor at a time, also under a plain LoRA adapter. Whatever lies on disk in
    another form (packed integers, other adapters, other names) is loaded as a whole.
    """
    artifacts.check_files(ref)
    path, base = artifacts.directories(ref)
    shapes = _shapes(ref)
    names = {f"{name}.weight" for name in shapes}
    files = {key: file for file in artifacts.weight_files(base) for key in _keys(file)}
    is_adapter = path != base
    is_packed = getattr(artifacts.read_config(ref), "quantization_config", None) is not None
    if is_packed or not names <= files.keys() or (is_adapter and why_not_plain(path)):
        return _loaded(ref, path)
    lora = plain_lora(path) if is_adapter else None

    def read(name: str) -> Tensor:
        with safe_open(files[f"{name}.weight"], framework="pt") as opened:
            weight_OI = opened.get_tensor(f"{name}.weight").float()
        if lora and name in lora.factors:
            A_RI, B_OR = lora.factors[name]
            weight_OI.addmm_(B_OR, A_RI, alpha=lora.scale)
        return weight_OI

    return Stored(ref, path, shapes, _finite(read, ref))


def _empty(ref: str) -> nn.Module:
    """The model without values, which takes no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(artifacts.read_config(ref))


def _keys(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return []
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _loaded(ref: str, path: Path) -> Stored:
    layers = outermost_linears(artifacts.load(ref, dtype=torch.float32).model)

    def read(name: str) -> Tensor:
        layer = layers[name]
        return (layer.dense() if isinstance(layer, LinearLike) else layer.weight).detach().float()

    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    return Stored(ref, path, shapes, _finite(read, ref))


def _finite(read: Callable[[str], Tensor], ref: str) -> Callable[[str], Tensor]:
    def checked(name: str) -> Tensor:
        weight_OI = read(name)
        if not weight_OI.isfinite().all():
            bad = int((~weight_OI.isfinite()).sum())
            raise UserError(
                f"{ref}: tensor {name}.weight has {bad} values that are NaN or infinite",
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
