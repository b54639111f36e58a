"""The data stream: its speed against `datasets`, its shares, and its memory as a corpus grows."""

from __future__ import annotations

import json
import random
import re
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import training
from bench.inputs import CORPUS, Inputs
from bench.results import Row, Target
from bench.turns import Side, Turn, in_turn

ROUNDS, SEQ_LEN, TOKENS = 3, 512, 1_000_000
SHARES = {"sentences": 0.5, "passages": 0.3, "books": 0.2}
"""Of the tokens, by source: documents of one sentence, of a passage, and of many passages."""
BOOK, SOURCE_BYTES = 60, 3_000_000
"""Passages of a book; text of each source, more than a million tokens take of it."""
STEPS, WARMED = 6, 4
"""Of the training that the stream is compared with; the first pieces are imports, loading and two steps."""
SIZES_MB = (16, 32, 64)
LARGE_BYTES, SHARD_TOKENS = 8_000_000, 500_000
"""From where on a corpus stays on disk, as all of `SIZES_MB` do; and of a shard, of which every one has several.

Both are a fraction of the defaults, so that corpora that are read in seconds show what much larger ones would.
"""
FASTER, FASTER_THAN_TRAINING, OFF, GROWN = 2, 20, 0.005, 0.1
PEER = "datasets 5.2, map and interleave_datasets"


def stream(inputs: Inputs, _peers: Path) -> list[Row]:
    """Tokens a second from text and from tokens that are kept; realised shares; how memory grows with a corpus."""
    given: dict[str, Any] = {
        "model": str(inputs.model), "work": str(inputs.work), "shares": SHARES, "tokens": TOKENS, "seq_len": SEQ_LEN,
        "files": {name: str(path) for name, path in _sources(inputs).items()}, "rounds": ROUNDS,
    }  # fmt: skip
    ours, theirs = in_turn(Side("stream_ours.py", given), Side("stream_interleave.py", given), pieces=1 + 2 * ROUNDS)
    how: dict[str, Any] = {
        "kind": "bench", "settings": {"corpus": CORPUS, "tokens": TOKENS, "shares": SHARES, "cores": 1},
    }  # fmt: skip
    compared: dict[str, Any] = {"unit": "tokens/s", "peer_name": PEER, **how}
    first, again = (_speeds(ours[at::2]) for at in (1, 2))
    return [
        Row(
            id="stream/first", values=first, peer=_speeds(theirs[1::2]), **compared,
            what="Tokens drawn from a mixture of three texts, over the time to read them, tokenise all of them, by the "
            "same tokenizer on both sides, and draw",
        ),
        Row(
            id="stream/again", values=again, peer=_speeds(theirs[2::2]), target=Target(">=", FASTER), **compared,
            what="Tokens drawn from a mixture of three texts, over the time to open the tokens kept from the pass "
            "before, and draw",
        ),
        _against_training(inputs, first),
        *_shares(ours[1], theirs[1], theirs[2], how),
        *_memory(inputs),
    ]  # fmt: skip


def _sources(inputs: Inputs) -> dict[str, Path]:
    """Files of rows with documents of very different lengths; no text is twice in one of them."""
    passages = [row["text"] for row in inputs.data.corpus.train]
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
    """How many times faster the stream is in `stream/first`, its tokenising included, than `adapt full` learns."""
    given = training._given(inputs, lr=5e-5) | {"steps": STEPS, "method": "full"}
    with Side("train_ours.py", given) as side:
        turns = [side.turn() for _ in range(2 + STEPS)][WARMED:]
    learnt = given["batch_size"] * given["seq_len"] / statistics.median(turn.seconds for turn in turns)
    return Row(
        id="stream/training",
        kind="bench",
        what="Tokens a second of stream/first, on one core, over those of training all parameters, on all cores",
        values=tuple(speed / learnt for speed in speeds),
        target=Target(">=", FASTER_THAN_TRAINING),
        settings={
            "model": inputs.model.name, "training_tokens_per_second": round(learnt, 1), "cores": 1,
            "training_cores": torch.get_num_threads(),
        },
    )  # fmt: skip


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
    """How much memory grows while a corpus is divided, tokenised, and read at its beginning and at its end.

    What the imports and the tokenizer take is there before and not counted. What is left has a part that is the same
    for every size, such as the held-out text, and a part for every byte of the corpus, which is judged.
    """
    grown: dict[int, int] = {}
    num_bytes: dict[int, int] = {}
    seen: list[dict[str, Any]] = []
    for size in SIZES_MB:
        corpus, cache = _written(inputs, size), inputs.work / f"cache-{size}"
        given = {"model": str(inputs.model), "corpus": str(corpus), "cache": str(cache), "large_bytes": LARGE_BYTES,
                 "shard_tokens": SHARD_TOKENS, "seq_len": SEQ_LEN}  # fmt: skip
        with Side("stream_memory.py", given) as side:
            start, done = side.turn(), side.turn()
        grown[size], num_bytes[size] = done.peak_rss_bytes - start.rss_bytes, corpus.stat().st_size
        seen.append({"megabytes": size, "started_rss": start.rss_bytes, "peak_rss": done.peak_rss_bytes, **done.facts})
        corpus.unlink()
        shutil.rmtree(cache)
    settings = {"corpora": seen, "large_bytes": LARGE_BYTES, "shard_tokens": SHARD_TOKENS, "seq_len": SEQ_LEN}
    slope = (max(grown.values()) - min(grown.values())) / (max(num_bytes.values()) - min(num_bytes.values()))
    return [
        *(
            Row(
                id=f"stream/memory-{size}", kind="bench", values=(float(grown[size]),), unit="bytes", settings=settings,
                what=f"Reading a corpus of {size:,} MB that stays on disk: peak memory above that before it",
            )
            for size in SIZES_MB
        ),
        Row(
            id="stream/memory", kind="bench", values=(slope,), target=Target("<=", GROWN), settings=settings,
            what=f"Peak memory for every byte by which a corpus is larger, from {min(SIZES_MB)} to {max(SIZES_MB)} MB",
        ),
    ]  # fmt: skip


def _written(inputs: Inputs, megabytes: int) -> Path:
    """A file of rows, each some words of the bench's corpus in an order of its own.

    No sentence is twice in it: what a held-out row has in common with others would be taken out of these.
    """
    words = " ".join(row["text"] for row in inputs.data.corpus.train).split()
    drawn = random.Random(megabytes)
    path, written = inputs.work / f"corpus-{megabytes}.jsonl", 0
    with path.open("w") as file:
        while written < megabytes * 1_000_000:
            line = json.dumps({"text": " ".join(drawn.choices(words, k=drawn.randint(100, 800)))}) + "\n"
            file.write(line)
            written += len(line)
    return path
