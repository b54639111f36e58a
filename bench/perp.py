"""`adapt perp` against the plain script that a user would write: the same pruned weights, windows, rate and steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bench.inputs import CORPUS, HELDOUT_WINDOWS, Inputs, compute_dtype, in_words
from bench.results import Row, Target
from bench.turns import Side, in_turn
from overhaul.adapt.perp import Perp

STEPS, STEPS_A_TURN, BATCH_SIZE, SEQ_LEN, RANK, ALPHA = 40, 2, 2, 256, 8, 16.0
LR = Perp.model_fields["lr"].default
FASTER = 1.7


def norms(inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of norms alone."""
    return _rows("norms", ["norms"], inputs)


def mask_lora(inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of norms and mask_lora."""
    return _rows("mask-lora", ["norms", "mask_lora"], inputs)


def _rows(slug: str, train: list[str], inputs: Inputs) -> list[Row]:
    outs = {side: inputs.work / f"perp-{slug}-{side}" for side in ("ours", "peer")}
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)
    given: dict[str, Any] = {
        "train": train,
        "steps": STEPS,
        "steps_a_turn": STEPS_A_TURN,
        "batch_size": BATCH_SIZE,
        "seq_len": SEQ_LEN,
        "lr": LR,
        "rank": RANK,
        "alpha": ALPHA,
        "seed": 0,
        "compute_dtype": compute_dtype(),
    }
    files = {"model": str(inputs.model), "windows": str(inputs.train_windows(STEPS * BATCH_SIZE, SEQ_LEN))}
    turns = STEPS // STEPS_A_TURN
    ours, peer = in_turn(
        Side("perp_ours.py", given | files | {"out": str(outs["ours"])}),
        Side("plain_perp.py", given | files | {"out": str(outs["peer"])}),
        pieces=1 + turns + 1,
    )
    settings = given | {
        "model": inputs.model.name,
        "corpus": CORPUS,
        "heldout": f"{HELDOUT_WINDOWS}x512",
        "total_seconds": round(sum(turn.seconds for turn in ours), 1),
        "peer_total_seconds": round(sum(turn.seconds for turn in peer), 1),
        "cpu_seconds": round(sum(turn.cpu_seconds for turn in ours), 1),
        "peer_cpu_seconds": round(sum(turn.cpu_seconds for turn in peer), 1),
        "peak_rss_bytes": ours[-1].peak_rss_bytes,
        "peer_peak_rss_bytes": peer[-1].peak_rss_bytes,
    }
    common: dict[str, Any] = {
        "kind": "bench",
        "peer_name": f"plain script, transformers + torch, {in_words(given['compute_dtype'])}",
        "settings": settings,
    }
    name = f"PERP {' + '.join(train)}, {BATCH_SIZE} x {SEQ_LEN} tokens a step"
    # The first turn also allocates what all later ones use.
    timed = slice(2, 1 + turns)
    return [
        Row(
            id=f"adapt-perp/{slug}-speed",
            what=name,
            unit="tokens/s",
            target=Target(">=", FASTER),
            **common,
            values=tuple(STEPS_A_TURN * BATCH_SIZE * SEQ_LEN / turn.seconds for turn in ours[timed]),
            peer=tuple(STEPS_A_TURN * BATCH_SIZE * SEQ_LEN / turn.seconds for turn in peer[timed]),
        ),
        Row(
            id=f"adapt-perp/{slug}-perplexity",
            what=f"{name}: held-out perplexity after {STEPS} steps",
            values=(inputs.perplexity(outs["ours"]),),
            peer=(inputs.perplexity(outs["peer"]),),
            **common,
        ),
    ]
