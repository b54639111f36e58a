"""Whether a method fits a model: told before anything is measured or changed."""

from __future__ import annotations

from typing import Any

from overhaul import banks, models
from overhaul.artifact import Artifact
from overhaul.deletion import ensemble
from overhaul.errors import UserError
from overhaul.generation import longest
from overhaul.method import Method, Training
from overhaul.packed import format_of, is_packed, is_quantized, trains_adapters


def refuse_unfit(method: Method, parent: Artifact) -> None:
    """Raises `UserError` for a method that would spoil the model, or that the model is no input for."""
    for refuse in (
        refuse_two_networks,
        _refuse_packed,
        _refuse_banks,
        _refuse_deletable,
        _refuse_adapter_of_adapter,
        _refuse_long_windows,
    ):
        refuse(method, parent)


def refuse_two_networks(method: Method, parent: Artifact) -> None:
    """Raises `UserError` where more than logits are asked of a model whose logits are made of two networks'."""
    if models.is_of_two(parent.model) and not method.reads_logits_alone:
        raise UserError(
            f"{parent.name} is two networks, whose logits are subtracted (forget whp): there is no one network that "
            "could be trained, changed or looked into",
            allowed="generate, compare and show; measure perplexity, choice, answers and muse; distill kd --teacher",
            hint=f"the model it was made from, {parent.lineage[-1].parents[0].path}" if parent.lineage else "",
        )


def _refuse_packed(method: Method, parent: Artifact) -> None:
    """Raises `UserError` for packed weights in the hands of a method that needs dense ones."""
    fits = method.reads_packed and (not isinstance(method, Training) or trains_adapters(parent.model))
    if is_packed(parent.model) and not fits:
        inner: Any = parent.model
        how = format_of(inner.config.quantization_config)
        if not is_quantized(parent.model):
            raise UserError(
                f"{parent.name} holds factors in place of weights ({how}), which cannot be pruned, cut or quantized",
                allowed="adapt sltrain trains them on, and merges them without --no-merge; adapt lora trains on top",
                hint="the same training without --no-merge",
            )
        raise UserError(
            f"{parent.name} is quantized ({how}): packed weights cannot be pruned, cut or trained as a whole",
            allowed="adapt lora trains adapters on top of int8 layers; measure, generate and compare read it",
            hint="the model it was quantized from",
        )


def _refuse_banks(method: Method, parent: Artifact) -> None:
    """Raises `UserError` where weights would change under banks that were learnt on them."""
    names = [] if method.keeps_banks else banks.tasks_of(parent.path)
    if names:
        raise UserError(
            f"{parent.name} has banks of {len(names)} tasks, such as {names[0]}, which fit no other weights than these",
            allowed="the method that they were learnt with, which adds tasks",
            hint="change the model first, and learn the tasks on what comes out",
        )


def _refuse_deletable(_method: Method, parent: Artifact) -> None:
    """Raises `UserError` where weights would change under adapters from which examples can be deleted."""
    if ensemble.is_there(parent.path):
        raise UserError(
            f"{parent.name} has adapters from which examples can be deleted, and they fit no other weights than these",
            allowed="forget delete, status and verify; generate and measure",
            hint="change the model first, and train the adapters on what comes out",
        )


def _refuse_adapter_of_adapter(method: Any, parent: Artifact) -> None:
    """Raises `UserError` before an adapter would be written whose base is an adapter, which nothing can load."""
    if not getattr(method, "merge", True) and (parent.path / "adapter_config.json").is_file():
        raise UserError(
            f"--no-merge: {parent.name} is itself an adapter directory, and no tool loads an adapter of an adapter",
            hint="without --no-merge, which writes a whole model with both",
        )


def _refuse_long_windows(method: Any, parent: Artifact) -> None:
    """Raises `UserError` for training windows longer than the model reads; calibration windows are shortened."""
    if isinstance(method, Training) and method.seq_len > (most := longest(parent.model)):
        raise UserError(f"--seq-len {method.seq_len} is more than the model reads", allowed=f"up to {most}")
