"""Looking at models without changing them: facts, comparison, the state of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from overhaul import artifact as artifacts
from overhaul import machine, pretrained
from overhaul.delta import Delta
from overhaul.fetch import cache_directory
from overhaul.judge import Judge, counts, short
from overhaul.options import Options
from overhaul.report.facts import Facts, Report


def describe(ref: str) -> dict[str, Any]:
    """Parameters, non-zero share, size, type and lineage of a model.

    Returns:
        `{"parameters", "nonzero_share", "nonzero_share_blocks", "bytes", "dtype", "verified", "lineage"}`; each
        lineage entry has `verb`, `method`, `fields`, `parent`, `seconds`, `peak_rss_bytes` and more.
    """
    made = artifacts.load(ref)
    counted = counts(made.model)
    return {
        "parameters": counted["parameters"],
        "nonzero_share": counted["nonzero_share_all"],
        "nonzero_share_blocks": counted["nonzero_share_blocks"],
        "bytes": artifacts.size_on_disk(made.path),
        "dtype": short(made.dtype),
        "verified": made.record.get("weights_sha256") == made.weights_sha256,
        "lineage": [step.to_json() for step in made.lineage],
    }


def compare(refs: Sequence[str], options: Options) -> tuple[Report, list[dict[str, Any]]]:
    """Measures models on one held-out text, and says which tensors differ from the first model's.

    Facts that a directory's record holds for the same text are taken from there.
    """
    device = machine.pick_device(options.device)
    dtype = machine.compute_dtype(options.dtype, device)
    facts: list[Facts] = []
    changes: list[dict[str, Any]] = []
    lineage = ()
    reference: dict[str, torch.Tensor] = {}
    for ref, label in zip(refs, _labels(refs), strict=True):
        made = artifacts.load(ref, device=device, dtype=machine.weights_dtype(dtype))
        judge = Judge.of(options, None, made.processor, dtype)
        facts.append(replace(judge.of_directory(made), label=label, path=ref, bytes=artifacts.size_on_disk(made.path)))
        state = made.model.state_dict()
        if reference:
            changes.append({"model": ref, **_difference(reference, state)})
        else:
            reference = {name: tensor.clone() for name, tensor in state.items()}
        lineage = made.lineage or lineage
    environment = {**machine.versions(), "hardware": machine.hardware(device)}
    title = "Comparison of " + ", ".join(_labels(refs))
    return Report(title=title, facts=tuple(facts), lineage=tuple(lineage), environment=environment), changes


def _labels(refs: Sequence[str]) -> list[str]:
    """The last part of each path, or as much of it as tells two of them apart."""
    most = max(len(Path(ref).parts) for ref in refs)
    shortened = [["/".join(Path(ref).parts[-count:]) for ref in refs] for count in range(1, most + 1)]
    return next((labels for labels in shortened if len(set(labels)) == len(set(refs))), list(refs))


def _difference(reference: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How many tensors differ, and the five with the largest relative change."""
    common = [name for name in state if name in reference and reference[name].shape == state[name].shape]
    delta = Delta.between({n: reference[n] for n in common}, {n: state[n] for n in common})
    sizes = {
        name: float(change.values.norm() / reference[name].float().norm().clamp_min(1e-30))
        for name, change in delta.changes.items()
    }
    most = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:5]
    return {
        "tensors": len(state),
        "changed_tensors": len(sizes),
        "other_tensors": len(reference.keys() ^ state.keys()) + len(reference.keys() & state.keys()) - len(common),
        "change_bytes": delta.bytes,
        "most_changed": [f"{name} ({sizes[name]:.2g})" for name in most],
    }


def doctor() -> dict[str, Any]:
    """Versions, hardware, caches."""
    device = machine.pick_device("auto")
    cache = cache_directory()
    held = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.exists() else 0
    models = [name for name in pretrained.NAMED if (cache / "models" / name / "config.json").is_file()]
    return {
        **machine.versions(),
        "device": str(device),
        "hardware": machine.hardware(device),
        "matrix products": short(machine.compute_dtype("auto", device)),
        "free memory": f"{machine.free_bytes() / 1e9:.1f} GB",
        "cache": f"{cache} ({held / 1e6:.0f} MB)",
        "models in cache": ", ".join(models) or "none",
    }
