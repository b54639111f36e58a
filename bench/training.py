"""Ways to adapt against transformers' Trainer, peft and each other: the same windows, one step a turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.inputs import CORPUS, Inputs, compute_dtype, in_words
from bench.results import Row, Target
from bench.turns import Side, Turn, in_turn

BATCH_SIZE, SEQ_LEN, STEPS = 4, 256, 12
IMPORTED, LOAD, WARMED = 0, 1, 4
"""The first pieces: imports, loading, and two steps that also allocate what all later ones use."""


def full(inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of `adapt full`."""
    given = _given(inputs, lr=5e-5)
    compute = given["compute_dtype"]
    return _rows(
        "full",
        f"Trainer of transformers 5.23, {in_words(compute)}",
        "all parameters",
        given,
        (1.2, 0.8),
        Side("train_ours.py", given | {"method": "full"}),
        Side("full_trainer.py", given | {"work": str(inputs.work / "trainer")}),
    )


def lora(inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of `adapt lora`, against a base in the type that is fast here; where that is bf16, also in fp32."""
    given = _given(inputs, lr=2e-4)
    compute = given["compute_dtype"]
    bases = {"lora": compute, **({"lora-fp32-base": "float32"} if compute != "float32" else {})}
    rows = []
    for slug, base_dtype in bases.items():
        rows += _rows(
            slug,
            f"peft 0.21, plain loop, {in_words(compute)}, {base_dtype} base",
            "LoRA rank 16, all linear layers",
            given | {"base_dtype": base_dtype},
            (1.7, None),
            Side("train_ours.py", given | {"method": "lora"}),
            Side("adapter_peft.py", given | {"method": "lora", "base_dtype": base_dtype}),
        )
    return rows


def randlora(inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of `adapt randlora`, against peft's and against this project's LoRA."""
    given = _given(inputs, lr=1e-4)
    compute, what = given["compute_dtype"], "RandLoRA rank 32, all linear layers"
    peft_name = f"peft 0.21, plain loop, {in_words(compute)}, {compute} base"
    of_peft, of_lora = given | {"method": "randlora", "base_dtype": compute}, given | {"method": "lora"}
    rows = []
    for slug, name, goal, script, settings in (
        ("randlora", peft_name, 2.0, "adapter_peft.py", of_peft),
        ("randlora-lora", "adapt lora, rank 16", 1 / 1.6, "train_ours.py", of_lora),
    ):
        ours = Side("train_ours.py", given | {"method": "randlora"})
        rows += _rows(slug, name, what, given, (goal, None), ours, Side(script, settings))
    return rows


def hft(inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of `adapt hft` against this project's full tuning: with the embedding, and with the blocks alone."""
    given, rows = _given(inputs, lr=5e-5), []
    for slug, what in (
        ("hft", "half of the matrices"),
        ("hft-blocks", "half of the blocks' matrices and no embedding"),
    ):
        ours, peer = (Side("train_ours.py", given | {"method": method}) for method in (slug, "full"))
        rows += _rows(slug, "adapt full", what, given, (1 / 0.95, None), ours, peer, state=0.6)
    return rows


def _given(inputs: Inputs, lr: float) -> dict[str, Any]:
    windows = inputs.train_windows(STEPS * BATCH_SIZE, SEQ_LEN)
    sizes = {"steps": STEPS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "lr": lr}
    return {"model": str(inputs.model), "windows": str(windows), "compute_dtype": compute_dtype(), **sizes}


def _rows(
    slug: str,
    peer_name: str,
    what: str,
    given: dict[str, Any],
    goals: tuple[float | None, float | None],
    ours: Side,
    peer: Side,
    state: float | None = None,
) -> list[Row]:
    faster, smaller = goals
    own, theirs = in_turn(ours, peer, pieces=2 + STEPS)
    settings = {key: value for key, value in given.items() if key not in ("windows", "model")} | {
        "model": Path(given["model"]).name,
        "corpus": CORPUS,
        "cpu_seconds": _cpu_seconds(own),
        "peer_cpu_seconds": _cpu_seconds(theirs),
        "imported_bytes": own[IMPORTED].rss_bytes,
        "peer_imported_bytes": theirs[IMPORTED].rss_bytes,
    }
    common: dict[str, Any] = {"kind": "bench", "peer_name": peer_name, "settings": settings}
    method = slug.split("-")[0]
    return [
        Row(
            id=f"adapt-{method}/{slug}-speed",
            what=f"Training {what}, {BATCH_SIZE} x {SEQ_LEN} tokens a step",
            unit="tokens/s",
            values=_speeds(own),
            peer=_speeds(theirs),
            target=Target(">=", faster) if faster else None,
            **common,
        ),
        Row(
            id=f"adapt-{method}/{slug}-memory",
            what=f"Training {what}: peak memory of the whole process",
            unit="bytes",
            values=(float(own[-1].peak_rss_bytes),),
            peer=(float(theirs[-1].peak_rss_bytes),),
            target=Target("<=", smaller) if smaller else None,
            **common,
        ),
        *([_state_row(f"adapt-{method}/{slug}-state", what, own, theirs, state, common)] if state else []),
    ]


def _state_row(
    id: str, what: str, own: Sequence[Turn], theirs: Sequence[Turn], target: float, common: dict[str, Any]
) -> Row:
    """What gradients and optimizer hold after a step, at most."""
    most, most_theirs = (float(max(turn.facts.get("state_bytes", 0) for turn in turns)) for turns in (own, theirs))
    told = f"Training {what}: gradients and optimizer states"
    return Row(
        id=id, what=told, unit="bytes", values=(most,), peer=(most_theirs,), target=Target("<=", target), **common
    )


def _speeds(turns: Sequence[Turn]) -> tuple[float, ...]:
    return tuple(BATCH_SIZE * SEQ_LEN / turn.seconds for turn in turns[WARMED:])


def _cpu_seconds(turns: Sequence[Turn]) -> float:
    """Mean of the timed steps."""
    timed = turns[WARMED:]
    return round(sum(turn.cpu_seconds for turn in timed) / len(timed), 3)
