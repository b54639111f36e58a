"""The best model in at most half the bytes of the bf16 original: what our chains give, and others' one-step routes.

Ours are commands, run as a user types them; every model is judged on the same held-out windows. A peer's directory is
written by transformers and counted as it lies there.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.inputs import CORPUS, HELDOUT_WINDOWS, Inputs
from bench.results import Row, Target
from bench.turns import Side
from overhaul import artifact

HALF = 0.5
STEPS, BATCH_SIZE, SEQ_LEN = 100, 2, 256
SHARE_OF_FP32 = "0.249"
"""A little under half of bf16, whose bytes are half of fp32's."""

BCT = ("quantize bct --mode w4a32 --budget " + SHARE_OF_FP32,)
CUT = (
    "shrink minitron --ffn 960 --samples 128 --seq-len 256 --data " + CORPUS,
    f"distill kd --teacher MODEL --steps {STEPS} --batch-size {BATCH_SIZE} --seq-len {SEQ_LEN} --lr 5e-4 "
    f"--save-every 0 --data {CORPUS}",
    "quantize int8",
)
SPARSE = (
    "prune wanda --sparsity 0.5 --samples 32 --seq-len 512 --data " + CORPUS,
    f"adapt perp --steps {STEPS} --batch-size {BATCH_SIZE} --seq-len {SEQ_LEN} --save-every 0 --data {CORPUS}",
    f"quantize bct --mode w4a32 --budget {SHARE_OF_FP32}",
)
OURS = {
    "bct": ("8-bit and 4-bit blocks within the budget, no training", BCT),
    "cut-distil-int8": ("FFN 1536 cut to 960, distilled, int8", CUT),
    "prune-perp-bct": ("50% Wanda, PERP, 8-bit and 4-bit blocks within the budget", SPARSE),
}
PEERS = {
    "bitsandbytes-nf4": "bitsandbytes NF4, through transformers",
    "bitsandbytes-int8": "bitsandbytes LLM.int8(), through transformers",
}


@dataclass(frozen=True, slots=True)
class Made:
    """One model: perplexity, and bytes of weights over those of the original."""

    perplexity: float
    share: float


def half(inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of every route: perplexity, and size as a share of the original's."""
    whole = artifact.size_on_disk(inputs.model)
    dense = Made(inputs.perplexity(inputs.model), 1.0)
    made = {name: _ours(inputs, name, route, whole) for name, (_, route) in OURS.items()}
    theirs = {name: _peer(inputs, name, whole) for name in PEERS}
    told = {"dense": "the original, bf16"} | {name: what for name, (what, _) in OURS.items()} | PEERS
    settings = {"model": inputs.model.name, "corpus": CORPUS, "heldout": f"{HELDOUT_WINDOWS}x512"}
    rows = []
    for name, one in {"dense": dense, **made, **theirs}.items():
        steps = {"commands": list(OURS[name][1])} if name in OURS else {}
        common: dict[str, Any] = {"kind": "claim", "settings": settings | steps}
        target = Target("<=", HALF) if name in OURS else None
        rows += [
            Row(
                id=f"half-the-size/{name}",
                what=f"Held-out perplexity: {told[name]}",
                values=(one.perplexity,),
                **common,
            ),
            Row(
                id=f"half-the-size/{name}-bytes",
                what=f"Bytes of weights over the original's: {told[name]}",
                unit="share",
                values=(one.share,),
                target=target,
                **common,
            ),
        ]
    return rows


def _ours(inputs: Inputs, name: str, route: tuple[str, ...], whole: int) -> Made:
    model = inputs.model
    for number, command in enumerate(route):
        out = inputs.work / f"half-{name}-{number}"
        verb, method, *rest = command.replace("MODEL", str(inputs.model)).split()
        words = [
            sys.executable,
            "-m",
            "overhaul",
            verb,
            method,
            str(model),
            "-o",
            str(out),
            *rest,
            "--evaluate",
            "none",
        ]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        model = out
    return Made(inputs.perplexity(model), artifact.size_on_disk(model) / whole)


def _peer(inputs: Inputs, name: str, whole: int) -> Made:
    out = inputs.work / f"half-{name}"
    given = {"model": str(inputs.model), "out": str(out), "kind": name.removeprefix("bitsandbytes-")}
    windows = inputs.heldout_windows()
    with Side("half_bitsandbytes.py", given | {"windows": str(windows)}) as side:
        perplexity = side.turn().facts["perplexity"]
    return Made(perplexity, artifact.size_on_disk(out) / whole)
