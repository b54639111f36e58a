"""Wanda and SparseGPT against llmcompressor: the same model, calibration windows and held-out windows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from bench.inputs import CORPUS, HELDOUT_WINDOWS, Inputs
from bench.results import Row, Target
from bench.turns import Side, Turn, in_turn

PEER = "llmcompressor 0.14"
SPARSITY, SAMPLES, SEQ_LEN, ROUNDS = 0.5, 32, 512, 2
IMPORTED, LOAD, PRUNE, WRITE = range(4)
"""The pieces of both sides, in order."""

FASTER = {"wanda": 4.0, "sparsegpt": 3.0}
NAMES = {"wanda": "Wanda", "sparsegpt": "SparseGPT"}


def wanda(inputs: Inputs, peers: Path) -> list[Row]:
    """Rows of `prune wanda`."""
    return _rows("wanda", inputs, peers)


def sparsegpt(inputs: Inputs, peers: Path) -> list[Row]:
    """Rows of `prune sparsegpt`."""
    return _rows("sparsegpt", inputs, peers)


def _rows(method: str, inputs: Inputs, peers: Path) -> list[Row]:
    windows = inputs.calibration_windows(SAMPLES, SEQ_LEN)
    outs = {side: inputs.work / f"{method}-{side}" for side in ("ours", "peer")}
    ours: list[list[Turn]] = []
    peer: list[list[Turn]] = []
    for _ in range(ROUNDS):
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)
        given = {"model": str(inputs.model), "windows": str(windows), "method": method, "sparsity": SPARSITY}
        first, second = in_turn(
            Side("prune_ours.py", given | {"out": str(outs["ours"])}),
            # bf16 is what the checkpoint has and what `dtype="auto"` of llmcompressor's examples loads; fp32 is slower.
            Side("prune_llmcompressor.py", given | {"out": str(outs["peer"]), "dtype": "bfloat16"}, str(peers)),
            pieces=4,
        )
        ours.append(first)
        peer.append(second)
    settings = {
        "model": inputs.model.name,
        "corpus": CORPUS,
        "samples": SAMPLES,
        "seq_len": SEQ_LEN,
        "sparsity": SPARSITY,
        "heldout": f"{HELDOUT_WINDOWS}x512",
        "peer_dtype": "bfloat16",
        "cpu_seconds": _cpu_seconds(ours),
        "peer_cpu_seconds": _cpu_seconds(peer),
    }
    common: dict[str, Any] = {"kind": "bench", "peer_name": PEER, "settings": settings}
    name = f"{NAMES[method]} {SPARSITY:.0%}, {SAMPLES} x {SEQ_LEN} tokens"
    return [
        Row(
            id=f"prune-{method}/seconds",
            what=f"{name}: seconds of pruning",
            unit="s",
            gain="peer/ours",
            values=_seconds(ours, (PRUNE,)),
            peer=_seconds(peer, (PRUNE,)),
            target=Target(">=", FASTER[method]),
            **common,
        ),
        Row(
            id=f"prune-{method}/seconds-total",
            what=f"{name}: seconds with loading and writing",
            unit="s",
            gain="peer/ours",
            values=_seconds(ours, (LOAD, PRUNE, WRITE)),
            peer=_seconds(peer, (LOAD, PRUNE, WRITE)),
            **common,
        ),
        Row(
            id=f"prune-{method}/perplexity",
            what=f"{name}: held-out perplexity",
            target=Target("<=", 1.01),
            values=(inputs.perplexity(outs["ours"]),),
            peer=(inputs.perplexity(outs["peer"]),),
            **common,
        ),
        *_memory(method, name, inputs, ours, peer, common),
    ]


def _seconds(rounds: Sequence[Sequence[Turn]], pieces: Sequence[int]) -> tuple[float, ...]:
    return tuple(sum(turns[piece].seconds for piece in pieces) for turns in rounds)


def _cpu_seconds(rounds: Sequence[Sequence[Turn]]) -> list[float]:
    return [round(turns[PRUNE].cpu_seconds, 1) for turns in rounds]


def _memory(
    method: str,
    name: str,
    inputs: Inputs,
    ours: Sequence[Sequence[Turn]],
    peer: Sequence[Sequence[Turn]],
    common: dict[str, Any],
) -> list[Row]:
    """Highest resident memory while pruning, less that of the same process after it pruned a model of two blocks."""

    def above_imports(turns: Sequence[Turn]) -> int:
        return turns[PRUNE].peak_rss_bytes - turns[IMPORTED].rss_bytes

    model_bytes = ours[0][LOAD].facts["model_bytes"]
    statistics_bytes = _statistics_bytes(method, inputs.model)
    settings = common["settings"] | {
        "model_bytes": model_bytes,
        "statistics_bytes": statistics_bytes,
        "imported_bytes": [turns[IMPORTED].rss_bytes for turns in ours],
    }
    return [
        Row(
            id=f"prune-{method}/memory",
            kind="bench",
            what=f"{name}: peak memory less one block's statistics, over the model's bytes",
            settings=settings,
            target=Target("<=", 1.3),
            values=tuple((above_imports(turns) - statistics_bytes) / model_bytes for turns in ours),
        ),
        Row(
            id=f"prune-{method}/memory-raw",
            what=f"{name}: peak memory of the whole process",
            unit="bytes",
            values=tuple(float(turns[PRUNE].peak_rss_bytes) for turns in ours),
            peer=tuple(float(turns[PRUNE].peak_rss_bytes) for turns in peer),
            **common | {"settings": settings},
        ),
    ]


def _statistics_bytes(method: str, model: Path) -> int:
    """fp32 statistics of one Llama block: of the inputs of q k v, of o, of gate and up, and of down."""
    config = AutoConfig.from_pretrained(model)
    widths = [config.hidden_size, config.hidden_size, config.hidden_size, config.intermediate_size]
    return 4 * sum(width**2 if method == "sparsegpt" else width for width in widths)
