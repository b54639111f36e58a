"""`quantize int8` against dense torch and against the peers' int8: prefill and decoding in turn, and what memory holds.

Every side reads the same model and the same tokens; a turn is one pass over the prompt or a few decoded tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.inputs import CORPUS, Inputs
from bench.results import Row, Target
from bench.turns import Side, Turn
from overhaul import artifact
from overhaul.quantize.int8 import Int8

PREFILL_TOKENS, DECODED_TOKENS, ROUNDS = 512, 32, 6
LOAD, WARM = 0, 1
"""The first pieces: loading, and one prefill and one decoding that are not timed."""


@dataclass(frozen=True, slots=True)
class Peer:
    """What int8 is compared with.

    Attributes:
        slug: in the rows' names.
        name: in the tables.
        script: of `bench/sides`.
        settings: for the script.
        prefill, decode: the ratios to be reached, if any.
        own_environment: whether it runs in the peers' environment.
    """

    slug: str
    name: str
    script: str
    settings: dict[str, Any]
    prefill: float | None = None
    decode: float | None = None
    own_environment: bool = False


PEERS = (
    Peer("bf16", "torch, bf16", "int8_dense.py", {"dtype": "bfloat16"}, prefill=0.9, decode=1.5),
    Peer("fp32", "torch, fp32", "int8_dense.py", {"dtype": "float32"}),
    Peer("bitsandbytes", "bitsandbytes 0.50, LLM.int8()", "int8_bitsandbytes.py", {}, prefill=3.0, decode=3.0),
    Peer("torch-dynamic", "torch dynamic quantization, int8", "int8_dynamic.py", {}),
    Peer("torchao", "torchao 0.18, int8 dynamic", "int8_torchao.py", {}, own_environment=True),
)


def int8(inputs: Inputs, peers: Path) -> list[Row]:
    """Rows of `quantize int8`: all sides take turns in one run."""
    quantized = _quantized(inputs)
    windows = str(inputs.train_windows(1, PREFILL_TOKENS))
    given = {"model": str(inputs.model), "windows": windows, "tokens": DECODED_TOKENS}
    sides = {"ours": Side("int8_ours.py", given | {"model": str(quantized)})}
    for peer in PEERS:
        python = str(peers) if peer.own_environment else sys.executable
        sides[peer.slug] = Side(peer.script, given | peer.settings, python)
    turns = _round_robin(sides, pieces=2 + 2 * ROUNDS)
    rows = [_resident(turns["ours"])]
    for peer in PEERS:
        rows += _rows(peer, turns["ours"], turns[peer.slug])
    return rows


def _quantized(inputs: Inputs) -> Path:
    made = artifact.load(inputs.model)
    Int8().apply(made.model, None)
    out = inputs.work / "int8"
    out.mkdir()
    artifact.write_model(made, out)
    return out


def _round_robin(sides: dict[str, Side], pieces: int) -> dict[str, list[Turn]]:
    """The pieces of all sides, one after the other; who goes first moves on by one each time."""
    done: dict[str, list[Turn]] = {name: [] for name in sides}
    names = list(sides)
    with ExitStack() as stack:
        for side in sides.values():
            stack.enter_context(side)
        for piece in range(pieces):
            first = piece % len(names)
            for name in (*names[first:], *names[:first]):
                done[name].append(sides[name].turn())
                print(f"  {name} {piece + 1}/{pieces}: {done[name][-1].seconds:.2f} s", file=sys.stderr)
    return done


def _rows(peer: Peer, ours: Sequence[Turn], theirs: Sequence[Turn]) -> list[Row]:
    rows = []
    for first, what, tokens, goal in (
        (2, "prefill", PREFILL_TOKENS, peer.prefill),
        (3, "decode", DECODED_TOKENS, peer.decode),
    ):
        told = f"prefill of {tokens} tokens" if what == "prefill" else f"decoding {tokens} tokens, one by one"
        rows.append(
            Row(
                id=f"quantize-int8/{what}-{peer.slug}",
                kind="bench",
                what=f"LLM.int8() on SmolLM2-135M, {told}",
                unit="tokens/s",
                peer_name=peer.name,
                values=tuple(tokens / turn.seconds for turn in ours[first::2]),
                peer=tuple(tokens / turn.seconds for turn in theirs[first::2]),
                target=Target(">=", goal) if goal else None,
                settings=_settings(ours, theirs),
            )
        )
    return rows


def _settings(ours: Sequence[Turn], theirs: Sequence[Turn]) -> dict[str, Any]:
    return {
        "corpus": CORPUS,
        "kernels": ours[-1].facts["kernels"],
        "dtype": ours[LOAD].facts["dtype"],
        "rss_bytes": ours[-1].rss_bytes,
        "peer_rss_bytes": theirs[-1].rss_bytes,
    }


def _resident(ours: Sequence[Turn]) -> Row:
    facts = ours[-1].facts
    return Row(
        id="quantize-int8/resident-bench",
        kind="bench",
        what="LLM.int8() on SmolLM2-135M: bytes of the linear layers in memory, over those in bf16",
        values=(facts["linear_bytes"] / (2 * facts["num_weights"]),),
        target=Target("<=", 0.52),
        settings={"kernels": facts["kernels"]},
    )
