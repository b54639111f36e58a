"""`adapt full --optimizer fira` against AdamW, and against the `fira` package: the same windows, one step a turn."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.inputs import CORPUS, Inputs, compute_dtype, in_words
from bench.results import Row, Target
from bench.turns import Side, Turn, in_turn

RANK, GAP, TIMED_GAP = 64, 200, 5
"""Directions kept; steps between two choices of the subspace; the same while timing, so that few steps hold some."""
BATCH_SIZE, SEQ_LEN, STEPS, LR = 4, 256, 12, 1e-4
BEGUN = 4
"""Imports, loading, and two steps, of which the first chooses a subspace."""


def fira(inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of a training step under Fira, the choice of the subspace spread over the steps that it serves."""
    windows = inputs.train_windows(STEPS * BATCH_SIZE, SEQ_LEN)
    given: dict[str, Any] = {
        "model": str(inputs.model), "windows": str(windows), "compute_dtype": compute_dtype(), "method": "full",
        "steps": STEPS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "lr": LR,
    }  # fmt: skip
    projected = given | {"optimizer": "fira", "rank": RANK, "gap": TIMED_GAP}
    rows = []
    for slug, name, script, settings, target in (
        ("adamw", "AdamW, all else equal", "train_ours.py", given, Target(">=", 1 / 1.25)),
        ("package", f"fira 1.0, plain loop, {in_words(compute_dtype())}", "full_fira.py", projected, Target(">=", 1)),
    ):
        own, peer = in_turn(Side("train_ours.py", projected), Side(script, settings), pieces=2 + STEPS)
        what = f"Training all parameters with Fira of rank {RANK}, a subspace every {GAP} steps"
        common: dict[str, Any] = {"kind": "bench", "peer_name": name}
        common["settings"] = {"rank": RANK, "gap": GAP, "corpus": CORPUS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN}
        theirs = _seconds(peer) if slug == "adamw" else _amortised(peer)
        rows += [
            Row(id=f"optimizers/fira-{slug}-step", what=f"{what}: seconds a step", unit="s", gain="peer/ours",
                values=_amortised(own), peer=theirs, target=target, **common),
            Row(id=f"optimizers/fira-{slug}-memory", what=f"{what}: peak memory of the whole process", unit="bytes",
                values=(float(own[-1].peak_rss_bytes),), peer=(float(peer[-1].peak_rss_bytes),), **common),
        ]  # fmt: skip
    return rows


def _seconds(turns: list[Turn]) -> tuple[float, ...]:
    return tuple(turn.seconds for turn in turns[BEGUN:])


def _amortised(turns: list[Turn]) -> tuple[float, ...]:
    """Seconds of the steps that chose no subspace, each with its share of what choosing one takes."""
    steps = turns[2:]
    chose = [turn.seconds for number, turn in enumerate(steps) if number % TIMED_GAP == 0 and number]
    plain = [turn.seconds for number, turn in enumerate(steps) if number % TIMED_GAP and number >= BEGUN - 2]
    share = (statistics.median(chose) - statistics.median(plain)) / GAP
    # As many as the other side has, so that rounds stand beside each other; the steps that chose stand for their like.
    middle = statistics.median(plain)
    every = [turn.seconds if number % TIMED_GAP else middle for number, turn in enumerate(steps)]
    return tuple(seconds + share for seconds in every[BEGUN - 2 :])
