"""Learning tasks against avalanche-lib, and DER++ refreshed against itself: Split Fashion-MNIST, a task a turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.inputs import Inputs
from bench.results import Row, Target
from bench.turns import Side, Turn, in_turn
from overhaul import artifact, blank
from overhaul.images import open_images
from overhaul.interop.pixels import normalized
from overhaul.kinds import Kind
from overhaul.task_data import TaskData
from overhaul.tasks import open_tasks

IMAGES, TASKS, BATCH_SIZE, MEMORY = "fashion-mnist", 5, 10, 500
IMPORTED_AND_LOADED, WARMED = 2, 3
"""The first pieces are imports and loading; the task after them also fills the memory, and is not timed."""
FASTER = 2.0
PEER = "avalanche-lib 0.6.0, {}, tensors normalised beforehand, no evaluation or logging while it learns"
HOW: dict[str, Any] = {"batch_size": BATCH_SIZE, "lr": 0.03, "memory": MEMORY}
METHODS: dict[str, tuple[str, str, dict[str, float]]] = {
    "der++": ("DER++", "DER with beta", {"alpha": 0.5, "label_weight": 0.5}),
    "ewc": ("EWC", "EWC, online", {"beta": 100.0}),
}
"""What it is called here and there, and the weights of its terms, which are the same on both sides."""


EVERY = 2
"""Steps of which one is refreshed, as in the paper; it takes one more pass up, so a step costs 1 + 1/2 passes."""


def tasks(inputs: Inputs, peers: Path) -> list[Row]:
    """Images a second while learning, with what follows each task, and the accuracy at the end."""
    given = {**HOW, "model": str(inputs.work / "cnn"), "tasks": str(_written(inputs.work))}
    return [row for method in METHODS for row in _rows(method, given, peers)]


def refresh(inputs: Inputs, _peers: Path) -> list[Row]:
    """What refreshing every second step leaves of DER++'s images a second."""
    work = inputs.work / "refresh"
    given = {**HOW, "model": str(work / "cnn"), "tasks": str(_written(work)), "num_tasks": TASKS}
    plain = {**given, **METHODS["der++"][2], "method": "der++"}
    own, other = in_turn(
        Side("learn_ours.py", {**plain, "refresh": {"every": EVERY}}),
        Side("learn_ours.py", plain),
        pieces=IMPORTED_AND_LOADED + TASKS + 1,
    )
    return [
        Row(
            id="learn-bregman/refresh-speed",
            what=f"Learning a task with DER++, refreshed every {EVERY} steps, with what follows it",
            kind="bench",
            unit="images/s",
            values=_speeds(own),
            peer=_speeds(other),
            peer_name="the same without refreshing",
            target=Target(">=", 1 / (1 + 1 / EVERY)),
            settings={
                **HOW,
                "every": EVERY,
                "fisher": "empirical",
                "model": "cnn, blank",
                "images": IMAGES,
                "cores": 1,
            },
        )
    ]


def _written(work: Path) -> Path:
    """A network with random weights in `cnn`, and its tasks, as it sees them, in the file that is returned."""
    blank.write("cnn", open_images(IMAGES), work / "cnn")
    processor = artifact.load(work / "cnn", kinds=(Kind.IMAGE_CLASSIFIER,)).processor
    data, arrays = TaskData(open_tasks([IMAGES], split=TASKS), processor, 1), {}
    for part in ("train", "heldout"):
        for number, examples in enumerate(getattr(data, part)):
            arrays[f"{part}/{number}/pixels"] = normalized(examples.images_NCHW, processor).numpy()
            arrays[f"{part}/{number}/labels"] = examples.labels_N
    np.savez(work / "tasks.npz", **arrays)
    return work / "tasks.npz"


def _rows(method: str, given: dict[str, Any], peers: Path) -> list[Row]:
    called, theirs, weights = METHODS[method]
    settings = {**given, **weights, "method": method, "num_tasks": TASKS}
    ours = Side("learn_ours.py", settings)
    peer = Side("learn_avalanche.py", settings, python=str(peers))
    # The last piece measures, and is not timed.
    own, other = in_turn(ours, peer, pieces=IMPORTED_AND_LOADED + TASKS + 1)
    told = {key: value for key, value in settings.items() if key not in ("model", "tasks")}
    common: dict[str, Any] = {
        "kind": "bench",
        "peer_name": PEER.format(theirs),
        "settings": {**told, "model": "cnn, blank", "images": f"{IMAGES}, {TASKS} x 2, one pass", "cores": 1},
    }
    slug = method.replace("+", "p")
    return [
        Row(
            id=f"learn-bregman/{slug}-speed",
            what=f"Learning a task with {called}, batches of {BATCH_SIZE}, and what follows it",
            unit="images/s",
            values=_speeds(own),
            peer=_speeds(other),
            target=Target(">=", FASTER),
            **common,
        ),
        Row(
            id=f"learn-bregman/{slug}-accuracy",
            what=f"Accuracy after {TASKS} tasks with {called}, class-IL",
            unit="share",
            values=(own[-1].facts["accuracy"],),
            peer=(other[-1].facts["accuracy"],),
            **common,
        ),
    ]


def _speeds(turns: list[Turn]) -> tuple[float, ...]:
    return tuple(turn.facts["images"] / turn.seconds for turn in turns[WARMED:-1])
