"""A model directory in memory and back: checked when it is read, written aside and renamed when it is saved."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from overhaul import disk, models, packed, pretrained, text_banks
from overhaul.deletion import ensemble
from overhaul.errors import UserError
from overhaul.kinds import Kind, class_of, kind_of, kind_of_model, processor_of
from overhaul.layers import Packed, merge_all, swap
from overhaul.layers.masked import MaskedLinear, unpack_bits
from overhaul.lineage import LineageStep, Parent

RECORD = "overhaul.json"
MASKS = "masks.safetensors"
IMPORTANCE = "importance.safetensors"
POSTERIOR = "posterior.safetensors"
SYNTHETIC = "synthetic.jsonl"
CONTINUATION = "continuation.pt"
STATE = ".state"
TRACKED = "overhaul"
"""What a tracker that writes files calls its folder, inside `STATE` while it trains."""
WEIGHTS = (
    *("*.safetensors", "*.bin", "*.index.json"),
    *("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data", "*.pt", "*.pth", "*.ckpt", "*.ot"),
)
"""Files with weights, in this and in other programs' formats: they are those of the model before."""
# Files that this project writes anew for every directory; everything else beside the weights is copied.
_OWN = {RECORD, MASKS, IMPORTANCE, POSTERIOR, SYNTHETIC, CONTINUATION, "recipe.yaml", "README.md", "report.html",
        "metrics.jsonl", "curves.png", "config.json", "generation_config.json", "source.json", "adapter_config.json",
        *models.FILES}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model with all that belongs to it.

    Attributes:
        model: on its device, in evaluation mode; pruned layers are `MaskedLinear`, quantized ones `Packed`.
        processor: the tokenizer (or image or audio processor).
        path: the directory it was read from.
        name: how the user called it.
        dtype: of the weights on disk.
        weights_sha256: hash of the weights on disk.
        lineage: what was done to it so far.
        record: the rest of `overhaul.json`.
    """

    model: nn.Module
    processor: Any
    path: Path
    name: str
    dtype: torch.dtype
    weights_sha256: str
    lineage: tuple[LineageStep, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What the model does."""
        return kind_of_model(self.model)

    def changed(self, model: nn.Module, step: LineageStep) -> Artifact:
        """The same artifact with another model and one more step behind it."""
        return replace(self, model=model, lineage=(*self.lineage, step))


LANGUAGE = (Kind.CAUSAL_LM,)
"""The kinds of model that most commands read."""


def load(
    ref: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    kinds: Sequence[Kind] = LANGUAGE,
    with_library: bool = False,
) -> Artifact:
    """Reads a named model, a transformers or PEFT directory, or a hub name.

    Args:
        ref: `smollm2-135m`, a path, or `owner/name`.
        dtype: of the weights in memory; None keeps that on disk.
        device: where to put the model.
        kinds: the kinds of model that are asked for.
        with_library: whether what lies beside the weights answers too: a library, banks, adapters of shards.

    Raises:
        UserError: no such model, no config, one of another kind, a damaged file, a format of quantized weights that is
            not known here, or weights that are not finite.
    """
    path, base = directories(ref)
    adapter = path if base != path else None
    config = _known_config(base, str(ref))
    kind = check_kind(config, str(ref), kinds)
    packing = config.get("quantization_config")
    if packing is not None:
        packed.check(packing, str(ref))
    check_weights(base)
    if adapter:
        _check_adapter(adapter)
    if packing is None:
        packed.refuse_unmarked(base, str(ref))
    model: Any = packed.read(base, packing, dtype, str(ref)) if packing else _read_model(base, dtype, str(ref), kind)
    processor = _processor_of(path, base, str(ref), kind)
    stored = _read_json(path / RECORD) if (path / RECORD).is_file() else {}
    model.eval()
    refuse_non_finite(model, str(ref))
    dtype_on_disk = stored_dtype(base) or model.dtype
    model.config.dtype = dtype_on_disk  # what a method that counts bytes on disk goes by, whatever they are in memory
    if (base / MASKS).is_file():
        apply_masks(model, base / MASKS)
    if adapter:
        from overhaul.interop.peft import read_adapter

        read_adapter(model, adapter, packed=bool(packing))
        model.eval()
    model = model.to(device)
    for beside in (text_banks, ensemble) if with_library else ():
        beside.attach(model, path)
    return Artifact(
        model=model,
        processor=processor,
        path=path,
        name=str(ref),
        dtype=dtype_on_disk,
        weights_sha256=weights_sha256(path),
        lineage=tuple(LineageStep.from_json(step) for step in stored.get("lineage", ())),
        record={key: value for key, value in stored.items() if key != "lineage"},
    )


def check_kind(config: Any, ref: str, kinds: Sequence[Kind] = LANGUAGE) -> Kind:
    """The kind of model that a configuration describes; `UserError` where it is none of those that are asked for."""
    if (kind := kind_of(config)) not in kinds:
        allowed = " or ".join(one.value for one in kinds)
        raise UserError(f"{ref} is a model of another kind: {kind.value}", allowed=f"here, a {allowed}")
    return kind


# Without a no, transformers asks on the terminal whether it may run code that lies in the directory.
_WHAT_IS_THERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def _known_config(base: Path, ref: str) -> dict[str, Any]:
    """The contents of config.json, of an architecture that transformers or this project has."""
    from transformers import CONFIG_MAPPING

    config = _read_json(base / "config.json")
    models.register(architecture := config.get("model_type", ""))
    if "auto_map" in config and architecture not in CONFIG_MAPPING:
        raise UserError(
            f"{ref} needs code of its own, for the architecture {architecture!r}; what lies in directories is not run",
            allowed=f"architectures of transformers, {', '.join(models.MODEL_TYPES)}",
        )
    return config


def _read_model(path: Path, dtype: torch.dtype | None, ref: str, kind: Kind) -> Any:
    """The model, every tensor of which is in the files: transformers alone would fill a gap with random numbers."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    logging.disable_progress_bar()
    how: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, **_WHAT_IS_THERE}
    loaded: Any
    try:
        loaded = class_of(kind).from_pretrained(path, dtype=dtype or "auto", **how)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise UserError(f"{ref} cannot be read as a {kind.value}: {error}") from error
    model, found = loaded
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{ref}: tensor {name} is {tuple(there)} in the file and {tuple(wanted)} by config.json",
            hint="a sound copy of the model",
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise UserError(
            f"{ref}: {len(missing)} tensors are missing from the weight files, such as {missing[0]}",
            hint="a sound copy of the model",
        )
    return model


def directories(ref: str | Path) -> tuple[Path, Path]:
    """The directory that `ref` means, and the one with the whole model: another one where the first is an adapter."""
    path = pretrained.resolve(str(ref))
    is_adapter = (path / "adapter_config.json").is_file()
    return path, pretrained.resolve(base_of(path)) if is_adapter else path


def read_config(ref: str | Path) -> Any:
    """The transformers configuration of a model, without its weights; `UserError` where there is none."""
    from transformers import AutoConfig

    _, base = directories(ref)
    _known_config(base, str(ref))
    try:
        return AutoConfig.from_pretrained(base, **_WHAT_IS_THERE)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{ref} has a configuration that cannot be read: {error}") from error


def kind_at(path: Path) -> Kind:
    """What the model in a directory does, by its configuration; an adapter's is its base's."""
    return kind_of(_read_json(directories(path)[1] / "config.json"))


def read_tokenizer(ref: str | Path) -> Any:
    """The tokenizer of a model, without its weights; `UserError` where there is none that can be read."""
    return _processor_of(*directories(ref), str(ref), Kind.CAUSAL_LM)


PROCESSORS = {
    **dict.fromkeys(Kind, ("tokenizer", "tokenizer_config.json", "tokenizer.json and tokenizer_config.json")),
    Kind.IMAGE_CLASSIFIER: ("image processor", "preprocessor_config.json", "preprocessor_config.json"),
}
"""Of each kind of model what reads its inputs, the file by which it is known, and all of its files."""


def _processor_of(own: Path, base: Path, ref: str, kind: Kind) -> Any:
    """That of the adapter's own directory where there is one, else that of its base."""
    called, file, files = PROCESSORS[kind]
    path = own if (own / file).is_file() else base
    try:
        return processor_of(kind).from_pretrained(path, **_WHAT_IS_THERE)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{ref} has no {called} that can be read: {str(error).strip().splitlines()[0]}",
            allowed=f"{files} beside the weights",
        ) from error


def base_of(adapter: Path) -> str:
    """The model that an adapter's directory names as its base; `UserError` where the configuration cannot be read."""
    return str(_read_json(adapter / "adapter_config.json")["base_model_name_or_path"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}", hint="a transformers model directory") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}", hint="a fresh copy of the model") from error


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights, in order; masks and the like are not among them."""
    stored = (file for file in path.glob("*.safetensors") if file.name not in (MASKS, IMPORTANCE, POSTERIOR))
    return sorted(stored) or sorted(path.glob("pytorch_model*.bin"))


def size_on_disk(path: Path) -> int:
    """Bytes of the weight files; an adapter's base, without which it is no model, counts with it."""
    return sum(file.stat().st_size for at in dict.fromkeys(directories(path)) for file in weight_files(at))


def check_files(ref: str) -> None:
    """Raises `UserError` for a model that cannot be read, as far as that shows without its values."""
    try:
        path, base = directories(ref)
        _read_json(base / "config.json")
        check_weights(base)
        if path != base:
            _check_adapter(path)
    except UserError as error:
        raise UserError(f"{ref}: {error.given}", allowed=error.allowed, hint=error.hint) from error


def _check_adapter(path: Path) -> None:
    if not (path / "adapter_model.safetensors").is_file():
        there = ", ".join(sorted(f.name for f in path.iterdir())[:8])
        raise UserError(f"{path} has no adapter weights", allowed=f"adapter_model.safetensors (there: {there})")


def check_weights(path: Path) -> None:
    """Raises `UserError` for missing, truncated or corrupt weight files, naming the file."""
    files = weight_files(path)
    if not files:
        there = ", ".join(sorted(f.name for f in path.iterdir())[:8])
        raise UserError(f"{path} has no weights", allowed="*.safetensors (there: " + (there or "nothing") + ")")
    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut short: {error}", hint="a fresh copy of the model") from error


def stored_dtype(ref: str | Path) -> torch.dtype | None:
    """On disk, of the largest tensor of the first weight file that holds numbers, not packed integers or scales."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for file in weight_files(pretrained.resolve(str(ref)))[:1]:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names_there = [name for name in opened.keys() if not name.endswith(packed.SCALES)]  # noqa: SIM118
                slices = [opened.get_slice(name) for name in names_there]
                numbers = [s for s in slices if s.get_dtype() in names]
                largest = max(numbers, key=lambda s: int(np.prod(s.get_shape())), default=None)
                return names[largest.get_dtype()] if largest else None
    return None


def refuse_non_finite(model: nn.Module, ref: str) -> None:
    """Raises `UserError` naming the first tensor with NaN or infinite values."""
    for name, parameter in itertools.chain(model.named_parameters(), model.named_buffers()):
        # The sum of a tensor is finite only if all of it is, and needs no second tensor of its size.
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)) and not parameter.isfinite().all():
            bad = int((~parameter.isfinite()).sum())
            raise UserError(
                f"{ref}: tensor {name} has {bad} values that are NaN or infinite",
                hint="a sound copy of the model",
            )


def weights_sha256(path: Path) -> str:
    """Hash of the weight files' contents, in order, and of what counts as a weight in an architecture of our own."""
    digest = hashlib.sha256(models.beside_weights(path))
    for file in weight_files(path):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def unchanged(parent: Parent) -> Path | None:
    """The directory that a step read, if it is still there and its weights are the same; never fetches anything."""
    path = pretrained.local(parent.path)
    return path if path is not None and weights_sha256(path) == parent.hash else None


def dense_ancestor(made: Artifact) -> Callable[[str], dict[str, Tensor]] | None:
    """Reads tensors of the newest ancestor without masks: `read("model.layers.0.")` -> tensors without that prefix.

    None when the lineage names no such directory of the same shape, or it is gone or was changed since.
    """
    for step in reversed(made.lineage):
        if step.verb == "shrink":  # what it was cut from has other shapes
            return None
        # The first parent is what was changed; the others, such as a teacher, were read beside it.
        for parent in step.parents[:1]:
            path = unchanged(parent)
            files = weight_files(path) if path is not None else []
            stock = all(file.suffix == ".safetensors" and file.name != "adapter_model.safetensors" for file in files)
            if path is None or not stock or (path / MASKS).is_file():
                continue

            def read(prefix: str, files: list[Path] = files) -> dict[str, Tensor]:
                found = {}
                for file in files:
                    with safe_open(file, framework="pt") as opened:
                        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
                        found |= {name.removeprefix(prefix): opened.get_tensor(name) for name in names}
                return found

            return read
    return None


def pack_masks(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The masks of all `MaskedLinear`, eight weights a byte, and their shapes as metadata."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}
    shapes = {name: json.dumps([layer.out_features, layer.in_features]) for name, layer in layers.items()}
    return {name: layer.packed for name, layer in layers.items()}, shapes


def apply_masks(model: nn.Module, path: Path) -> None:
    """Turns the layers whose masks are stored into `MaskedLinear`."""
    with safe_open(path, framework="pt") as stored:
        shapes = {name: json.loads(shape) for name, shape in (stored.metadata() or {}).items() if name != "format"}
        for name, (out, width) in shapes.items():
            mask_OI = unpack_bits(stored.get_tensor(name), (out, width))
            swap(model, [name], lambda linear, mask_OI=mask_OI: MaskedLinear.from_linear(linear, mask_OI))


def check_out(out: Path, *, parent: Path | None = None, resume: bool = False) -> None:
    """Refuses an output directory before any work is done.

    Raises:
        UserError: not empty, inside the model that is read, not writable, or an unfinished run without `resume`.
    """
    if parent and (out.resolve() == parent.resolve() or parent.resolve() in out.resolve().parents):
        raise UserError(f"-o {out} is inside the model that is read, {parent}", hint="a directory beside it")
    if out.exists() and not out.is_dir():
        raise UserError(f"-o {out} is a file", hint="a new directory")
    there = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if there == [STATE]:
        if not resume:
            raise UserError(f"-o {out} holds an unfinished run", hint="the same command with --resume, or a new -o")
    elif there:
        raise UserError(
            f"-o {out} is not empty: it holds {', '.join(there[:5])}",
            hint="a new directory; nothing is ever overwritten",
        )
    above = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    if not above.is_dir():
        raise UserError(f"-o {out} cannot be written: {above} is a file", hint="a new directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"-o {out} cannot be written: no permission in {above}", hint="a directory of your own")


@contextlib.contextmanager
def stage(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write into; renamed to `out` when the block ends well, removed when it does not.

    Raises:
        UserError: the disk is full or not writable; the partial output is gone.
    """
    with disk.aside(out) as directory:
        yield directory
        # Only an empty directory or an unfinished run's checkpoints were accepted by `check_out`.
        if (out / STATE / TRACKED).is_dir():
            shutil.move(out / STATE / TRACKED, directory / TRACKED)
        shutil.rmtree(out / STATE, ignore_errors=True)


def refuse_full_disk(out: Path, needed_bytes: int) -> None:
    """Raises `UserError` before the work begins when the output cannot fit."""
    above = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    if free < needed_bytes:
        raise UserError(
            f"-o {out} needs about {needed_bytes / 1e6:.0f} MB and {above} has {free / 1e6:.0f} MB free",
            hint="-o on a larger disk",
        )


def write_model(artifact: Artifact, directory: Path) -> None:
    """Writes what plain transformers loads, weights, configuration and tokenizer, and the masks beside it."""
    model: Any = merge_all(artifact.model)
    refuse_non_finite(model, "the result")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(artifact.dtype)
    for module in model.modules():
        if isinstance(module, Packed):  # they have floats that are no parameters, and keep their scales as they are
            module.to(artifact.dtype)
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            module.enforce()
    if packed.is_packed(model):
        packed.write(model, directory)
    else:
        model.save_pretrained(directory)
    masks, shapes = pack_masks(model)
    if masks:
        save_file(masks, directory / MASKS, metadata=shapes)
    copy_companions(artifact.path, directory)
    # A classifier of texts finds their end by the padding, which its tokenizer may not have had before.
    if artifact.kind is Kind.TEXT_CLASSIFIER or not (directory / PROCESSORS[artifact.kind][1]).exists():
        artifact.processor.save_pretrained(directory)


def copy_companions(source: Path, directory: Path) -> None:
    """Copies what lies beside the weights as it is: tokenizer, chat template, processor files."""
    weights = {file for pattern in WEIGHTS for file in source.glob(pattern)}
    for file in source.iterdir():
        if file.is_file() and file not in weights and file.name not in _OWN and not file.name.startswith("."):
            shutil.copy2(file, directory / file.name)


def write_record(artifact: Artifact, directory: Path, extra: Mapping[str, Any]) -> None:
    """Writes `overhaul.json`: format, hash of the weights, lineage, and `extra`."""
    record = {
        "format": 1,
        "weights_sha256": weights_sha256(directory),
        "lineage": [step.to_json() for step in artifact.lineage],
        **extra,
    }
    (directory / RECORD).write_text(json.dumps(record, indent=1, default=str))


def read_record(path: Path) -> dict[str, Any]:
    """The contents of `overhaul.json`."""
    return _read_json(path / RECORD)


def verify(path: Path) -> bool:
    """Whether the weights of a directory are those its record describes."""
    return read_record(path)["weights_sha256"] == weights_sha256(path)
