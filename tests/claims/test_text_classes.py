"""SmolLM2 with a head that grows over classes of texts, no example kept (Smith et al., 2023, on text).

Six corpora are a class each, cut into pieces of twelve words: novels and encyclopedia, then German and English manual
pages, then code and news. What is compared is the accuracy among all six at the end, without the task (class-IL). A few
steps of small batches: a figure of the beginning of a training, at a size for one thread. Rate and weights are one
value each, not a search.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from bench import results
from bench.results import Row, Target

from claims.tasks_learnt import SEEDS, Matrices, class_il, learnt, less, task_il
from overhaul.forgetting import global_forgetting
from overhaul.labelled_texts import open_classes
from overhaul.pretrained import DEFAULT, resolve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

CORPORA = ("manpages-de", "stdlib", "austen", "boolq-passages", "xsum", "manpages-en")
HOW = ("--label-field", "label", "--split", "3", "--heldout", "16", "--classifier", "growing", "--seq-len", "24",
       "--batch-size", "8", "--steps", "10", "--optimizer", "adamw", "--lr", "0.001")  # fmt: skip
WORDS, PIECES = 12, 200
"""Of a piece; pieces of a class, of which a fifth is held out."""
NOTHING = ("--predictions", "0")
QKV = ("--train", "qkv")
L2 = ("--weight-term", "l2", "--weights", "1")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "finetune": ("softmax head, all weights, nothing held", (*NOTHING, "--head", "softmax")),
    "qkv": ("binary head, queries, keys and values alone, nothing held", (*NOTHING, *QKV)),
    "qkv-l2": ("binary head, queries, keys and values alone, L2", (*NOTHING, *QKV, *L2)),
    "qkv-l2-predictions": ("binary head, queries, keys and values alone, PredKD and L2", (*QKV, *L2)),
}
AHEAD = 0.2
SETTINGS = {"model": DEFAULT, "tasks": f"{', '.join(CORPORA)}: 3 x 2", "flags": " ".join(HOW)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Matrices]]:
    """`run("qkv-l2")` -> the matrices of each seed, recorded the first time."""
    root = tmp_path_factory.mktemp("classes")
    # Read once: each run would else cut all corpora anew.
    pieces = [
        {"text": piece, "label": one.name}
        for one in open_classes(CORPORA, words=WORDS, limit=PIECES)
        for piece in one.train.texts
    ]
    topics = root / "topics.jsonl"
    topics.write_text("\n".join(map(json.dumps, pieces)))

    @cache
    def of(name: str) -> list[Matrices]:
        told, flags = METHODS[name]
        found = [
            learnt("rehearsal-free", resolve(DEFAULT), root / f"{name}-{seed}", seed, ("--tasks", topics, *HOW, *flags))
            for seed in SEEDS
        ]
        results.record([
            _row(f"{name}-class", f"Accuracy after three tasks, {told}, class-IL", class_il(found)),
            _row(f"{name}-task", f"Accuracy after three tasks, {told}, task-IL", task_il(found)),
            _row(f"{name}-forgetting", f"Global forgetting, {told}",
                 [global_forgetting(one["as learnt"]) for one in found]),
        ])  # fmt: skip
        return found

    return of


def test_projections_that_are_held_are_20_points_ahead_of_all_weights_that_are_not(
    run: Callable[[str], list[Matrices]],
):
    ahead = less(class_il(run("qkv-l2")), class_il(run("finetune")))
    row = _row("ahead", "L2 on queries, keys and values above all weights and a softmax, class-IL", ahead,
               Target(">=", AHEAD))  # fmt: skip
    results.record([row])
    results.hold(row)


@pytest.mark.parametrize("name", ["qkv", "qkv-l2-predictions"])
def test_the_others_are_measured(run: Callable[[str], list[Matrices]], name: str):
    """No accuracy is asked of them; no task is chosen better among all classes than among its own."""
    for told, alone in zip(class_il(run(name)), task_il(run(name)), strict=True):
        assert told <= alone
    gain = less(class_il(run(name)), class_il(run("qkv-l2")))
    results.record([_row(f"{name}-beside", f"{METHODS[name][0]}, less L2 alone, class-IL", gain)])


def _row(name: str, what: str, values: Sequence[float], target: Target | None = None) -> Row:
    told = {"kind": "claim", "unit": "share", "seeds": SEEDS, "settings": SETTINGS}
    return Row(id=f"learn-rehearsal-free/texts-{name}", what=f"SmolLM2, six classes of text: {what}",
               values=tuple(values), target=target, **told)  # fmt: skip
