"""The data stream: its speed against `datasets`, its shares, and its memory as a corpus grows."""

from __future__ import annotations

import json
import random
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import training
from bench.inputs import CORPUS, Inputs
from bench.results import Row, Target
from bench.turns import Side, Turn, in_turn
from overhaul import on_disk, tokens

ROUNDS, SEQ_LEN, TOKENS = 3, 512, 1_000_000
SHARES = {"sentences": 0.5, "passages": 0.3, "books": 0.2}
"""Of the tokens, by source: documents of one sentence, of a passage, and of many passages."""
BOOK, SOURCE_BYTES = 60, 3_000_000
"""Passages of a book; text of each source, more than a million tokens take of it."""
STEPS, WARMED = 6, 4
"""Of the training that the stream is compared with; the first pieces are imports, loading and two steps."""
SIZES_MB = (300, 600, 1200)
LARGE_BYTES, SHARD_TOKENS = on_disk.LARGE_BYTES, tokens.SHARD_TOKENS
"""Of a corpus that stays on disk, as all of `SIZES_MB` do; and of a shard, of which every one has several."""
FASTER, FASTER_THAN_TRAINING, OFF, GROWN = 2, 20, 0.005, 1.1
PEER = "datasets 5.2, map and interleave_datasets"


def stream(inputs: Inputs, _peers: Path) -> list[Row]:
    """Tokens a second from text and from tokens that are kept; realised shares; peak memory at three sizes."""
    given: dict[str, Any] = {
        "model": str(inputs.model), "work": str(inputs.work), "shares": SHARES, "tokens": TOKENS, "seq_len": SEQ_LEN,
        "files": {name: str(path) for name, path in _sources(inputs).items()}, "rounds": ROUNDS,
    }  # fmt: skip
    ours, theirs = in_turn(Side("stream_ours.py", given), Side("stream_interleave.py", given), pieces=1 + 2 * ROUNDS)
    how: dict[str, Any] = {
        "kind": "bench", "settings": {"corpus": CORPUS, "tokens": TOKENS, "shares": SHARES, "cores": 1},
    }  # fmt: skip
    compared = {"unit": "tokens/s", "peer_name": PEER, "target": Target(">=", FASTER)}
    first, again = (_speeds(ours[at::2]) for at in (1, 2))
    return [
        Row(
            id="stream/first", what="A mixture of three texts, tokenised and packed", values=first,
            peer=_speeds(theirs[1::2]), **compared, **how,
        ),
        Row(
            id="stream/again", what="A mixture of three texts whose tokens are kept", values=again,
            peer=_speeds(theirs[2::2]), **compared, **how,
        ),
        _against_training(inputs, first),
        *_shares(ours[1], theirs[1], theirs[2], how),
        *_memory(inputs),
    ]  # fmt: skip


def _sources(inputs: Inputs) -> dict[str, Path]:
    """Files of rows with documents of very different lengths; no text is twice in one of them."""
    passages = [text for row in inputs.data.corpus.train for name, text in row.columns if name == "text"]
    sentences = [sentence for passage in passages for sentence in re.split(r"(?<=[.!?])\s+", passage)]
    books = [" ".join(passages[at : at + BOOK]) for at in range(0, len(passages), BOOK)]
    found = {}
    for name, texts in (("sentences", sentences), ("passages", passages), ("books", books)):
        found[name] = inputs.work / f"{name}.jsonl"
        written = 0
        with found[name].open("w") as file:
            for text in dict.fromkeys(texts):
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= SOURCE_BYTES:
                    break
        assert written >= SOURCE_BYTES, f"{CORPUS} has only {written} bytes of {name}"
    return found


def _speeds(turns: Sequence[Turn]) -> tuple[float, ...]:
    return tuple(sum(turn.facts["given"].values()) / turn.seconds for turn in turns)


def _against_training(inputs: Inputs, speeds: Sequence[float]) -> Row:
    """How many times faster the stream is, its tokenising included, than `adapt full` learns from it."""
    given = training._given(inputs, lr=5e-5) | {"steps": STEPS, "method": "full"}
    with Side("train_ours.py", given) as side:
        turns = [side.turn() for _ in range(2 + STEPS)][WARMED:]
    learnt = given["batch_size"] * given["seq_len"] / statistics.median(turn.seconds for turn in turns)
    return Row(
        id="stream/training",
        kind="bench",
        what="A mixture of three texts, tokenised and packed: tokens a second over those of training all parameters",
        values=tuple(speed / learnt for speed in speeds),
        target=Target(">=", FASTER_THAN_TRAINING),
        settings={"model": inputs.model.name, "training_tokens_per_second": round(learnt, 1), "cores": 1},
    )


def _shares(ours: Turn, by_documents: Turn, corrected: Turn, how: dict[str, Any]) -> list[Row]:
    """How far realised shares are from those asked for, at most."""
    what = f"Largest error of a share in {TOKENS:,} tokens"
    return [
        Row(
            id=f"stream/{slug}", what=f"{what}{told}", values=(_off(turn.facts["given"]),), unit="share",
            target=target, **how,
        )
        for slug, told, turn, target in (
            ("shares", "", ours, Target("<=", OFF)),
            ("shares-interleaved", ", interleave_datasets with the shares as probabilities", by_documents, None),
            ("shares-corrected", ", interleave_datasets with shares over mean lengths", corrected, None),
        )
    ]  # fmt: skip


def _off(given: dict[str, int]) -> float:
    total = sum(given.values())
    return max(abs(given[name] / total - share) for name, share in SHARES.items())


def _memory(inputs: Inputs) -> list[Row]:
    """Peak memory while a corpus is divided, tokenised, and read at its beginning and at its end."""
    peaks: dict[int, Turn] = {}
    for size in SIZES_MB:
        corpus = _written(inputs, size)
        cache = inputs.work / f"cache-{size}"
        given = {"model": str(inputs.model), "corpus": str(corpus), "cache": str(cache), "large_bytes": LARGE_BYTES,
                 "shard_tokens": SHARD_TOKENS, "seq_len": SEQ_LEN}  # fmt: skip
        with Side("stream_memory.py", given) as side:
            side.turn()
            peaks[size] = side.turn()
        corpus.unlink()
    settings = {
        "megabytes": list(SIZES_MB), "tokens": [turn.facts["tokens"] for turn in peaks.values()],
        "shards": [turn.facts["shards"] for turn in peaks.values()], "large_bytes": LARGE_BYTES,
        "shard_tokens": SHARD_TOKENS, "peaks": [turn.peak_rss_bytes for turn in peaks.values()],
    }  # fmt: skip
    whole = [
        Row(
            id=f"stream/memory-{size}", kind="bench", what=f"Reading a corpus of {size:,} MB: peak memory",
            values=(float(turn.peak_rss_bytes),), unit="bytes", settings=settings,
        )
        for size, turn in peaks.items()
    ]  # fmt: skip
    low, high = peaks[min(SIZES_MB)].peak_rss_bytes, peaks[max(SIZES_MB)].peak_rss_bytes
    times = max(SIZES_MB) // min(SIZES_MB)
    return [
        *whole,
        Row(
            id="stream/memory", kind="bench", what=f"Peak memory of a corpus {times} times as large, over the first's",
            values=(high / low,), target=Target("<=", GROWN), settings=settings,
        ),
    ]  # fmt: skip


def _written(inputs: Inputs, megabytes: int) -> Path:
    """A file of rows, each some sentences of the bench's corpus in an order of its own."""
    text = " ".join(text for row in inputs.data.corpus.train for name, text in row.columns if name == "text")
    sentences, drawn = re.split(r"(?<=[.!?])\s+", text), random.Random(megabytes)
    path, written = inputs.work / f"corpus-{megabytes}.jsonl", 0
    with path.open("w") as file:
        while written < megabytes * 1_000_000:
            line = json.dumps({"text": " ".join(drawn.choices(sentences, k=drawn.randint(5, 40)))}) + "\n"
            file.write(line)
            written += len(line)
    return path
