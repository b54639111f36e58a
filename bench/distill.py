"""`distill kd` against plain torch: the divergence alone, and a whole training step; one piece a turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.inputs import CORPUS, Inputs
from bench.results import Row, Target
from bench.turns import Side, in_turn
from overhaul import artifact, machine

TOKENS, WIDTH, WORDS, LOSSES = 1024, 576, 49_152, 8
BATCH_SIZE, SEQ_LEN, STEPS, LR = 4, 256, 8, 1e-4
STUDENT_DEPTH = 20
"""Blocks of the student; the default model, its teacher, has 30."""
WARMED = 2
"""Timed pieces that also allocate what all later ones use."""


def divergence(_inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of the loss with its gradients."""
    given = {"tokens": TOKENS, "width": WIDTH, "words": WORDS}
    ours, peer = in_turn(
        Side("divergence_ours.py", given), Side("divergence_plain.py", given), pieces=1 + WARMED + LOSSES
    )
    common: dict[str, Any] = {
        "kind": "bench",
        "peer_name": "all logits of both models and torch's kl_div, float32",
        "settings": given | {"loss": ours[-1].facts["loss"], "peer_loss": peer[-1].facts["loss"]},
    }
    what = f"Divergence of two models with its gradients, {TOKENS} tokens, width {WIDTH}, {WORDS:,} words"
    return [
        Row(
            id="distill-kd/divergence-speed",
            what=f"{what}: seconds",
            unit="s",
            gain="peer/ours",
            target=Target(">=", 1),
            values=tuple(turn.seconds for turn in ours[1 + WARMED :]),
            peer=tuple(turn.seconds for turn in peer[1 + WARMED :]),
            **common,
        ),
        Row(
            id="distill-kd/divergence-memory",
            what=f"{what}: peak memory above that of the inputs",
            unit="bytes",
            target=Target("<=", 0.4),
            values=(float(ours[-1].peak_rss_bytes - ours[0].rss_bytes),),
            peer=(float(peer[-1].peak_rss_bytes - peer[0].rss_bytes),),
            **common,
        ),
    ]


def step(inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of a training step."""
    dtype = str(machine.compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    given: dict[str, Any] = {
        "student": str(_student(inputs)),
        "teacher": str(inputs.model),
        "windows": str(inputs.train_windows(STEPS * BATCH_SIZE, SEQ_LEN)),
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "seq_len": SEQ_LEN,
        "lr": LR,
        "dtype": dtype,
    }
    ours, peer = in_turn(Side("distill_ours.py", given), Side("plain_distill.py", given), pieces=2 + STEPS)
    settings = {key: value for key, value in given.items() if key not in ("student", "teacher", "windows")}
    common: dict[str, Any] = {
        "kind": "bench",
        "peer_name": f"plain script, transformers + torch, {dtype}",
        "settings": settings | {"model": inputs.model.name, "student_depth": STUDENT_DEPTH, "corpus": CORPUS},
    }
    what = f"Distilling {STUDENT_DEPTH} of 30 blocks, {BATCH_SIZE} x {SEQ_LEN} tokens a step"
    timed = slice(2 + WARMED, None)
    return [
        Row(
            id="distill-kd/step-speed",
            what=what,
            unit="tokens/s",
            target=Target(">=", 1),
            values=tuple(BATCH_SIZE * SEQ_LEN / turn.seconds for turn in ours[timed]),
            peer=tuple(BATCH_SIZE * SEQ_LEN / turn.seconds for turn in peer[timed]),
            **common,
        ),
        Row(
            id="distill-kd/step-memory",
            what=f"{what}: peak memory of the whole process",
            unit="bytes",
            target=Target("<=", 0.8),
            values=(float(ours[-1].peak_rss_bytes),),
            peer=(float(peer[-1].peak_rss_bytes),),
            **common,
        ),
    ]


def _student(inputs: Inputs) -> Path:
    """A directory with the first blocks of the default model."""
    made, path = artifact.load(inputs.model), inputs.work / "student"
    model: Any = made.model
    model.model.layers = model.model.layers[:STUDENT_DEPTH]
    model.config.num_hidden_layers = STUDENT_DEPTH
    model.save_pretrained(path)
    made.processor.save_pretrained(path)
    return path
