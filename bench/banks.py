"""Banks of channel-wise reprogramming in a ResNet-50: how long it takes to put one in place, and how large it is."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import ResNetForImageClassification

from bench.inputs import Inputs
from bench.results import Row, Target
from overhaul import blank
from overhaul.banks import Banked
from overhaul.sockets.reprogramming import Reprogramming

IMAGE = 224
CLASSES = 20
TASKS, ROUNDS = 4, 100
"""All banks are put in place in turn, each so many times; the first turn is not timed."""
MOST_MS = 5.0
MOST_PERCENT = 0.6


def banks(_inputs: Inputs, _peers: Path) -> list[Row]:
    """The median time to change from one task's bank to another one's, and a bank's share of the frozen weights."""
    torch.manual_seed(0)
    model: Any = ResNetForImageClassification(blank.SHAPES["resnet50"].config(3, (IMAGE, IMAGE), CLASSES)).eval()
    backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier"))
    head = sum(p.numel() for name, p in model.named_parameters() if name.startswith("classifier"))
    banked = Banked(model, Reprogramming())
    for task in range(TASKS):
        banked.begin([f"{task}/{number}" for number in range(CLASSES)])
        banked.keep(str(task))
    banked.use(0)
    taken = [_milliseconds(banked, task) for _ in range(ROUNDS + 1) for task in range(TASKS)][TASKS:]
    settings = {"model": "resnet50, blank", "classes": CLASSES, "tasks": TASKS, "rounds": ROUNDS, "cores": 1}
    own = banked.banks[0].num_values - head
    return [
        Row(id="learn-clr/swap", kind="bench", what="Changing the bank of a ResNet-50, median of many", unit="ms",
            values=(statistics.median(taken),), target=Target("<", MOST_MS), settings=settings),
        Row(id="learn-clr/share", kind="bench", what="Kernels and normalisations of a bank in a ResNet-50's weights",
            unit="%", values=(100 * own / backbone,), target=Target("<", MOST_PERCENT), settings=settings),
        Row(id="learn-clr/share-head", kind="bench", what=f"The same with the task's head of {CLASSES} classes",
            unit="%", values=(100 * banked.banks[0].num_values / backbone,), settings=settings),
    ]  # fmt: skip


def _milliseconds(banked: Banked, task: int) -> float:
    began = time.perf_counter()
    banked.use(task)
    return 1e3 * (time.perf_counter() - began)
