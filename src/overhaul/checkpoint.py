"""`.state/step-N/`: everything a killed run needs to go on to the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from overhaul import disk, sharding
from overhaul.errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk, after `step` optimizer steps."""

    path: Path
    step: int

    def manifest(self) -> dict[str, Any]:
        """What was asked of the run that wrote it, and the hashes of its files."""
        return json.loads((self.path / MANIFEST).read_text())


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: trainable parameters and stored buffers, each once, by name."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    stored = model.state_dict(keep_vars=True)
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in stored}


def write(
    root: Path,
    step: int,
    *,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    asked: dict[str, Any],
    keep: int,
) -> None:
    """Writes `root/step-N` aside, renames it, and removes all but the newest `keep`.

    Args:
        root: the `.state` directory.
        step: optimizer steps done.
        tensors: the model's `trained_tensors`, whole.
        state: optimizer, schedule, stream, watchers, random generators: anything torch can save.
        asked: the settings of the run, compared on resume.
        keep: how many checkpoints stay.

    Raises:
        UserError: the disk is full or cannot be written; the checkpoints before this one are whole.
    """
    target = root / f"step-{step:06d}"
    with disk.aside(target) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "model.safetensors")
        save(state, partial / "state.pt")
        hashes = {file.name: disk.sha256(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "asked": asked, "sha256": hashes}, indent=1))
        shutil.rmtree(target, ignore_errors=True)
    # Later ones are damaged: the run went on from an earlier one.
    past = [old for old in _all(root) if old.step > step]
    for old in (*past, *[old for old in _all(root) if old.step <= step][:-keep]):
        shutil.rmtree(old.path)


def save(state: Mapping[str, Any], path: Path) -> None:
    """`torch.save` that raises `OSError` when the disk refuses."""
    try:
        with path.open("wb") as file:
            torch.save(dict(state), file)
    except RuntimeError as error:
        # torch closes its archive after a failed write and reports that this fails too.
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, or None."""
    return next((checkpoint for checkpoint in reversed(_all(root)) if _is_whole(checkpoint)), None)


def _is_whole(checkpoint: Checkpoint) -> bool:
    try:
        hashes = checkpoint.manifest()["sha256"]
    except json.JSONDecodeError:
        return False
    files = {name: checkpoint.path / name for name in hashes}
    return all(file.is_file() and disk.sha256(file) == hashes[name] for name, file in files.items())


def read(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """Puts the stored tensors into `model` and returns the rest of the state."""
    stored = load_file(checkpoint.path / "model.safetensors")
    tensors = trained_tensors(model)
    if stored.keys() != tensors.keys():
        odd = sorted(stored.keys() ^ tensors.keys())
        raise UserError(f"{checkpoint.path} holds other tensors than this run trains, such as {odd[0]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(sharding.like(stored[name], tensor))
    return torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=False)


def refuse_changes(checkpoint: Checkpoint, asked: dict[str, Any], *, free: tuple[str, ...]) -> None:
    """Compares what is asked now with what the checkpoint's run was asked.

    Raises:
        UserError: anything but the `free` settings differs; all differences are shown.
    """
    before = checkpoint.manifest()["asked"]
    keys = sorted((before.keys() | asked.keys()) - set(free))
    changed = [
        f"{key}: {before.get(key)!r} then, {asked.get(key)!r} now" for key in keys if before.get(key) != asked.get(key)
    ]
    if changed:
        raise UserError(
            "--resume cannot go on with other settings: " + "; ".join(changed),
            allowed="changes of " + ", ".join(free),
            hint="the same command as before with --resume, or a new -o",
        )


def _all(root: Path) -> list[Checkpoint]:
    found = [path for path in root.glob("step-*") if (path / MANIFEST).is_file()]
    return sorted((Checkpoint(path, int(path.name.split("-")[1])) for path in found), key=lambda c: c.step)
