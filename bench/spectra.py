"""Spectra of every matrix of the default model under an adapter, against peft's own look at intruders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from bench.inputs import Inputs
from bench.results import Row, Target
from bench.turns import Side, in_turn
from overhaul import artifact
from overhaul.interop.peft import write_adapter
from overhaul.layers import swap
from overhaul.layers.lora import LoRALinear
from overhaul.select import select_linears

ROUNDS, RANK = 3, 8
STRENGTH = 2
"""Norm of an adapter's change over that of the weight: enough for intruders."""
MOST_SECONDS, REPEATED = 90, 0.5


def spectra(inputs: Inputs, _peers: Path) -> list[Row]:
    """Seconds with nothing kept, with the base kept, and of a repeated run; peft does all anew each time."""
    made = artifact.load(inputs.model, dtype=torch.float32)
    adapter, other = (_adapter(inputs, copy.deepcopy(made.model), seed) for seed in (0, 1))
    given: dict[str, Any] = {
        "model": str(inputs.model), "work": str(inputs.work), "rounds": ROUNDS,
        "adapter": str(adapter), "other": str(other),
    }  # fmt: skip
    ours, theirs = in_turn(Side("spectra_ours.py", given), Side("intruders_peft.py", given), pieces=1 + 3 * ROUNDS)
    ours, theirs = ours[1:], theirs[1:]
    assert [turn.facts["intruders"] for turn in ours] == [turn.facts["intruders"] for turn in theirs]
    first, known, again = (tuple(turn.seconds for turn in ours[at::3]) for at in range(3))
    peer = tuple(turn.seconds for turn in theirs[::3])
    common: dict[str, Any] = {
        "kind": "bench", "settings": {"model": inputs.model.name, "rank": RANK, **ours[0].facts},
    }  # fmt: skip
    what = "Spectra of all matrices"
    compared = {"unit": "s", "peer_name": "peft 0.21, reduce_intruder_dimension", "gain": "peer/ours"}
    return [
        Row(
            id="measure-spectra/first", what=what, values=first, peer=peer, target=Target(">=", 1), **compared, **common
        ),
        Row(
            id="measure-spectra/seconds", what=what, values=first, unit="s", target=Target("<", MOST_SECONDS), **common
        ),
        Row(
            id="measure-spectra/known-base",
            what=f"{what} of another adapter of a base that is known, over the first's time",
            values=tuple(later / once for later, once in zip(known, first, strict=True)),
            **common,
        ),
        Row(
            id="measure-spectra/again",
            what=f"{what} a second time, over the first's time",
            values=tuple(later / once for later, once in zip(again, first, strict=True)),
            target=Target("<", REPEATED),
            **common,
        ),
    ]


def _adapter(inputs: Inputs, model: torch.nn.Module, seed: int) -> Path:
    """A LoRA adapter of random factors, large enough to have intruders."""
    torch.manual_seed(seed)
    layers = swap(model, select_linears(model), lambda old: LoRALinear.from_linear(old, RANK, 2.0 * RANK))
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_()
            change_OI = layer.scale * layer.lora_B @ layer.lora_A
            layer.lora_B *= STRENGTH * layer.weight.norm() / change_OI.norm()
    directory = inputs.work / f"adapter-{seed}"
    directory.mkdir()
    write_adapter(model, inputs.model, directory)
    return directory
