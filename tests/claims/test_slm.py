"""A library beside SmolLM2 (Peng et al., 2024): three tasks one after the other, and nobody says which is asked.

Ports of machines, the parity of numbers, what a function returns: each with answers of a few tokens. What is compared
is the share of held-out questions whose answer the model would write to the last token, with the task told and not, and
that after one task after the other was trained into one set of weights: the same layers whole, or LoRA of that rank.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from bench import results
from bench.results import Row, Target

from command import overhaul
from overhaul import artifact, task_record
from overhaul.forgetting import AccuracyMatrix, average_accuracy, forgetting
from overhaul.text_task_data import TextTaskData
from overhaul.text_tasks import open_texts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

SEEDS = (0, 1, 2)
HOW = ("--steps", "100", "--batch-size", "4", "--seq-len", "64", "--heldout", "60", "--save-every", "0")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "slm": ("slm", ("--lr", "1e-3", "--key-texts", "128")),
    # The same layers, without a library: all tasks in one set of weights.
    "sequential": ("bregman", ("--output-term", "none", "--optimizer", "adamw", "--lr", "1e-4", "--train", "*o_proj*")),
}
# Windows hold about four questions each: as many are seen as by the others, which read one question a row.
LORA = ("--rank", "8", "--lr", "1e-3", "--steps", "25", "--batch-size", "4", "--seq-len", "64",
        "--evaluate", "none", "--save-every", "0")  # fmt: skip
SETTINGS = {"model": "smollm2-135m", "tasks": "ports, parity, marks", "flags": " ".join(HOW)}


def _rows() -> dict[str, list[dict[str, str]]]:
    """Questions that the model cannot answer before, each kind with answers of its own."""
    dice = random.Random(0)
    names = ["alder", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo", "hazel", "ironwood", "juniper"]
    ports = {name: str(dice.randint(1000, 9999)) for name in names}
    asked = ["Which port does {} use?", "On what port is {} to be found?", "Tell the port of {}.", "{} listens where?"]
    numbers = dice.sample(range(10, 1000), 300)
    words = [f"{a}{b}{c}" for a in "bdfg" for b in "aeio" for c in "klmnprst"]
    return {
        "ports": [
            {"question": f"Machine {n}: {asked[n % 4].format(name)}", "answer": ports[name]}
            for n in range(30)
            for name in names
        ],
        "parity": [{"question": f"Count {n}. Left or right?", "answer": "left" if n % 2 else "right"} for n in numbers],
        "marks": [{"question": f"def mark_{word}():", "answer": f"return '{word[0].upper()}'"} for word in words],
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in _rows().items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [folder / f"{name}.jsonl" for name in _rows()]


@pytest.fixture(scope="module")
def learnt(tasks: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """`learnt("slm")` -> the directories of each seed: with the library, or one set of weights trained in sequence."""
    root = tmp_path_factory.mktemp("learnt")

    @cache
    def of(name: str) -> list[Any]:
        found = []
        method, flags = METHODS[name]
        for seed in SEEDS:
            out = root / f"{name}-{seed}"
            asked = ("learn", method, "smollm2-135m", "-o", out, "--tasks", *tasks, *HOW, *flags, "--seed", seed)
            done = overhaul(*asked)
            assert done.code == 0, done.err
            found.append(out)
        return found

    return of


@pytest.fixture(scope="module")
def lora(tasks: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Right answers over all tasks after LoRA on one after the other, of each seed."""
    root = tmp_path_factory.mktemp("lora")

    def right(seed: int) -> float:
        model = "smollm2-135m"
        for task in tasks:
            out = root / f"{seed}-{task.stem}"
            asked = ("adapt", "lora", model, "-o", out, "--data", task, *LORA, "--seed", seed)
            done = overhaul(*asked)
            assert done.code == 0, done.err
            model = str(out)
        made = artifact.load(model)
        data = TextTaskData(open_texts([str(task) for task in tasks]), made.processor, 64, seed, measured=60)
        answered = [float(data.said(made.model, number).right_N.mean()) for number in range(len(tasks))]
        return sum(answered) / len(answered)

    return [right(seed) for seed in SEEDS]


def test_a_library_needs_no_task_and_forgets_nothing(learnt: Callable[[str], list[Any]], lora: list[float]):
    records = [task_record.read(out) for out in learnt("slm")]
    told, untold = ([one.matrices[kind] for one in records] for kind in ("task-IL", "class-IL"))
    sequential = [task_record.read(out).matrices["class-IL"] for out in learnt("sequential")]
    rows = (
        _row("untold", "Right answers after three tasks, task not told", _means(untold)),
        _row("told", "Right answers after three tasks, task told", _means(told)),
        _row("behind", "Not told less told", _less(untold, told), Target(">=", -0.02)),
        _row("sequential", "Right answers, the output projections trained in sequence", _means(sequential)),
        _row("lora", "Right answers, LoRA of rank 8 in sequence", lora),
        _row("above-whole", "Library above output projections in sequence", _less(untold, sequential)),
        _row("ahead", "Library above LoRA in sequence",
             [one - other for one, other in zip(_means(untold), lora, strict=True)], Target(">=", 0.15)),
        _row("forgetting", "Forgetting, task not told", [forgetting(one) for one in untold], Target("<", 0.01)),
        _row("retrieval", "Questions that find their own task's entries", [_found(out) for out in learnt("slm")],
             Target(">=", 0.95)),
    )  # fmt: skip
    results.record(rows)
    for row in rows:
        results.hold(row)


def _means(of: Sequence[AccuracyMatrix]) -> list[float]:
    return [average_accuracy(one) for one in of]


def _less(of: Sequence[AccuracyMatrix], other: Sequence[AccuracyMatrix]) -> list[float]:
    return [one - two for one, two in zip(_means(of), _means(other), strict=True)]


def _found(out: Path) -> float:
    """The mean share over tasks of questions whose nearest key is one of their own task."""
    tables = json.loads((out / "overhaul.json").read_text())["tables"]
    rows = next(table["rows"] for table in tables if table["title"].startswith("For which task's entries"))
    return sum(float(row[1 + place].rstrip("%")) / 100 for place, row in enumerate(rows)) / len(rows)


def _row(name: str, what: str, values: Sequence[float], target: Target | None = None) -> Row:
    told: dict[str, Any] = {"kind": "claim", "unit": "share", "seeds": SEEDS, "settings": SETTINGS}
    return Row(id=f"learn-slm/{name}", what=what, values=tuple(values), target=target, **told)
