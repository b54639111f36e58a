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
SPARSITY, SAMPLES, SEQ_LEN = 0.5, 32, 512
IMPORTED, LOAD, PRUNE, WRITE = range(4)
"""The pieces of both sides, in order."""

ROUNDS = 1
FASTER = {"wanda": 4.0, "sparsegpt": 3.0}
PEER_DTYPES = {"": "bfloat16", "-fp32-peer": "float32"}
"""By suffix of the rows: bf16 is what transformers loads by itself, fp32 what the targets were set against."""

NAMES = {"wanda": "Wanda", "sparsegpt": "SparseGPT"}


def wanda(inputs: Inputs, peers: Path) -> list[Row]:
    """Rows of `prune wanda`."""
    return _rows("wanda", "", inputs, peers)


def sparsegpt(inputs: Inputs, peers: Path) -> list[Row]:
    """Rows of `prune sparsegpt`."""
    return _rows("sparsegpt", "", inputs, peers)


def wanda_fp32_peer(inputs: Inputs, peers: Path) -> list[Row]:
    """Rows of `prune wanda` against a peer in fp32."""
    return _rows("wanda", "-fp32-peer", inputs, peers)


def sparsegpt_fp32_peer(inputs: Inputs, peers: Path) -> list[Row]:
    """Rows of `prune sparsegpt` against a peer in fp32."""
    return _rows("sparsegpt", "-fp32-peer", inputs, peers)


def _rows(method: str, suffix: str, inputs: Inputs, peers: Path) -> list[Row]:
    windows, dtype = inputs.calibration_windows(SAMPLES, SEQ_LEN), PEER_DTYPES[suffix]
    outs = {side: inputs.work / f"{method}-{side}" for side in ("ours", "peer")}
    ours: list[list[Turn]] = []
    peer: list[list[Turn]] = []
    for _ in range(ROUNDS):
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)
        given = {"model": str(inputs.model), "windows": str(windows), "method": method, "sparsity": SPARSITY}
        first, second = in_turn(
            Side("prune_ours.py", given | {"out": str(outs["ours"])}),
            Side("prune_llmcompressor.py", given | {"out": str(outs["peer"]), "dtype": dtype}, str(peers)),
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
        "peer_dtype": dtype,
        "cpu_seconds": _cpu_seconds(ours),
        "peer_cpu_seconds": _cpu_seconds(peer),
    }
    common: dict[str, Any] = {"kind": "bench", "peer_name": f"{PEER}, {dtype}", "settings": settings}
    name = f"{NAMES[method]} {SPARSITY:.0%}, {SAMPLES} x {SEQ_LEN} tokens"
    return [
        Row(
            id=f"prune-{method}/seconds{suffix}",
            what=f"{name}: seconds of pruning",
            unit="s",
            gain="peer/ours",
            values=_seconds(ours, (PRUNE,)),
            peer=_seconds(peer, (PRUNE,)),
            target=Target(">=", FASTER[method]),
            **common,
        ),
        Row(
            id=f"prune-{method}/seconds-total{suffix}",
            what=f"{name}: seconds with loading and writing",
            unit="s",
            gain="peer/ours",
            values=_seconds(ours, (LOAD, PRUNE, WRITE)),
            peer=_seconds(peer, (LOAD, PRUNE, WRITE)),
            **common,
        ),
        Row(
            id=f"prune-{method}/perplexity{suffix}",
            what=f"{name}: held-out perplexity",
            target=Target("<=", 1.01),
            values=(inputs.perplexity(outs["ours"]),),
            peer=(inputs.perplexity(outs["peer"]),),
            **common,
        ),
        *_memory(method, suffix, name, inputs, ours, peer, common),
    ]


def _seconds(rounds: Sequence[Sequence[Turn]], pieces: Sequence[int]) -> tuple[float, ...]:
    return tuple(sum(turns[piece].seconds for piece in pieces) for turns in rounds)


def _cpu_seconds(rounds: Sequence[Sequence[Turn]]) -> list[float]:
    return [round(turns[PRUNE].cpu_seconds, 1) for turns in rounds]


def _memory(
    method: str,
    suffix: str,
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
    own = Row(
        id=f"prune-{method}/memory",
        kind="bench",
        what=f"{name}: peak memory above that of a model of two narrow blocks, less one block's statistics, "
        "over the model's bytes",
        settings=settings,
        target=Target("<=", 1.3),
        values=tuple((above_imports(turns) - statistics_bytes) / model_bytes for turns in ours),
    )
    return [
        *([] if suffix else [own]),
        Row(
            id=f"prune-{method}/memory-raw{suffix}",
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
