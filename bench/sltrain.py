"""`factored.from_config` against the dense model of the same shape: a step from scratch, and the memory it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.inputs import Inputs
from bench.results import Row, Target
from bench.turns import Side, Turn, in_turn

CONFIG = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
    "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
FORM = {"rank": 128, "density": 0.03, "alpha": 32.0}
"""The paper's model of 60M parameters."""
BATCH_SIZE, SEQ_LEN, STEPS = 2, 64, 6
"""Few tokens, so that activations are little beside weights, gradients and optimizer."""
IMPORTED, MADE, WARMED = 0, 1, 3


def scratch(_inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of training from scratch."""
    given: dict[str, Any] = {"config": CONFIG, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN}
    own, theirs = in_turn(
        Side("sltrain_scratch.py", given | {"form": FORM}),
        Side("sltrain_scratch.py", given | {"form": None}),
        pieces=2 + STEPS,
    )
    numbers = [turns[MADE].facts["parameters"] for turns in (own, theirs)]
    share = numbers[0] / numbers[1]
    common: dict[str, Any] = {
        "kind": "bench",
        "peer_name": "dense, the same loop",
        "settings": given | FORM | {"parameters": numbers[0], "peer_parameters": numbers[1], "ratio": share},
    }
    told = f"at {share:.2f} of the parameters"
    return [
        Row(
            id="adapt-sltrain/scratch-held",
            what=f"A 60M Llama from scratch, {told}: weights, gradients, optimizer states and positions",
            unit="bytes",
            values=(_held(own),),
            peer=(_held(theirs),),
            target=Target("<=", round(1.02 * share, 4)),
            **common,
        ),
        Row(
            id="adapt-sltrain/scratch-memory",
            what=f"A 60M Llama from scratch, {told}: peak memory of the process beyond its imports",
            unit="bytes",
            values=(_peak(own),),
            peer=(_peak(theirs),),
            **common,
        ),
        Row(
            id="adapt-sltrain/scratch-speed",
            what=f"A 60M Llama from scratch, {BATCH_SIZE} x {SEQ_LEN} tokens a step",
            unit="tokens/s",
            values=_speeds(own),
            peer=_speeds(theirs),
            **common,
        ),
    ]


def _held(turns: Sequence[Turn]) -> float:
    return float(sum(turns[-1].facts[part] for part in ("weights", "gradients", "optimizer")))


def _peak(turns: Sequence[Turn]) -> float:
    return float(turns[-1].peak_rss_bytes - turns[IMPORTED].rss_bytes)


def _speeds(turns: Sequence[Turn]) -> tuple[float, ...]:
    return tuple(BATCH_SIZE * SEQ_LEN / turn.seconds for turn in turns[WARMED:])
