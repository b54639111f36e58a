"""Deleting an example from SmolLM2 with adapters in slices, against training its shard again; and what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.inputs import Inputs
from bench.results import Row, Target
from overhaul import artifact, forget_service
from overhaul.deletion.book import Book
from overhaul.deletion.ensemble import Served
from overhaul.documents import Row as Example
from overhaul.select import shapes_of

EXAMPLES, SLICES, STEPS, BATCH_SIZE, SEQ_LEN, RANK, ROUNDS = 60, 3, 20, 4, 64, 8, 3
AT_MOST_SECONDS, FASTER = 1.0, 2.0
HEADER_BYTES = 8
"""Of a safetensors file before its header, which says how long that is."""


def s3t(inputs: Inputs, _peers: Path) -> list[Row]:
    """One shard, one sequence: seconds to train it, with kept states and without, and to delete; bytes by formula."""
    asked = inputs.work / "asked.jsonl"
    _run("data", "questions", "-o", asked, "--count", EXAMPLES)
    # In turn: what else the machine does must not fall on one of the two.
    pairs = [[_trained(inputs, asked, flag, round_) for flag in ("--cache", "--no-cache")] for round_ in range(ROUNDS)]
    kept = pairs[0][0]
    settings: dict[str, Any] = {"model": "smollm2-135m", "examples": EXAMPLES, "slices": SLICES, "steps": STEPS,
                                "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "rank": RANK, "cores": 1}  # fmt: skip
    seconds, whole_seconds = (tuple(map(_seconds, directories)) for directories in zip(*pairs, strict=True))
    ratios = tuple(a / b for a, b in zip(whole_seconds, seconds, strict=True))
    formula, on_disk = _bytes(kept)
    erased, taken_up = _deleted(kept, asked)
    bench: dict[str, Any] = {"kind": "bench", "settings": settings}
    return [
        Row(id="forget-s3t/delete", what="Deleting an example, log and files included", unit="s", values=(erased,),
            **bench),
        Row(id="forget-s3t/served", what="... until a model in memory answers without it", unit="s",
            values=(erased + taken_up,), target=Target("<", AT_MOST_SECONDS), **bench),
        Row(id="forget-s3t/shard", what="Training the shard's stages again instead", unit="s", values=seconds,
            **bench),
        Row(id="forget-s3t/cache", what="Training a sequence without kept states over that with them", unit="ratio",
            values=ratios, target=Target(">=", FASTER), **bench),
        Row(id="forget-s3t/bytes", what="Bytes of tensors on disk over rank x (inputs + outputs) x 4", unit="ratio",
            values=(on_disk / formula,), target=Target("==", 1.0), **bench),
    ]  # fmt: skip


def _run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "overhaul", *map(str, words)], check=True)


def _trained(inputs: Inputs, asked: Path, flag: str, round_: int) -> Path:
    out = inputs.work / f"service{flag}-{round_}"
    _run("forget", "s3t", inputs.model, "-o", out, "--data", asked, flag, "--shards", 1, "--slices", SLICES, "--budget",
         1, "--steps", STEPS, "--batch-size", BATCH_SIZE, "--seq-len", SEQ_LEN, "--rank", RANK, "--evaluate", "none",
         "--save-every", 0)  # fmt: skip
    return out


def _seconds(directory: Path) -> float:
    """What the step took, states that are computed once included."""
    return json.loads((directory / "overhaul.json").read_text())["lineage"][-1]["seconds"]


def _bytes(directory: Path) -> tuple[int, int]:
    """Of all stages' tensors: by the formula, and on disk without headers."""
    model = artifact.load(directory).model
    with Book(directory) as book:
        names = [book.settings["layers"][len(stage.sequence) - 1] for stage in book.stages()]
        files = [book.path.parent / stage.file for stage in book.stages()]
    formula = sum(4 * RANK * sum(shape) for layers in names for shape in shapes_of(model, layers).values())
    return formula, sum(_without_header(file) for file in files)


def _without_header(file: Path) -> int:
    with file.open("rb") as opened:
        return file.stat().st_size - HEADER_BYTES - int.from_bytes(opened.read(HEADER_BYTES), "little")


def _deleted(directory: Path, asked: Path) -> tuple[float, float]:
    """Seconds to delete an example of the last slice, and to take that up in a model that answers."""
    with Book(directory) as book:
        last = book.orders[0][0][-1]
        lines = asked.read_text().splitlines()
        line = next(one for one in lines if [*book.cells(_keys(book, one))] == [(0, last)])
    (directory.parent / "gone.jsonl").write_text(line + "\n")
    model = artifact.load(directory).model
    served = Served(model, directory)
    began = time.perf_counter()
    forget_service.delete(directory, texts=directory.parent / "gone.jsonl")
    erased = time.perf_counter() - began
    served.refresh()
    return erased, time.perf_counter() - began - erased


def _keys(book: Book, line: str) -> tuple[bytes, ...]:
    told = json.loads(line)
    return book.find_content(Example((("question", told["question"]), ("answer", told["answer"]))).id).there
