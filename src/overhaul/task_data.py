"""A task sequence as one model sees it: pixels, batches, held-out examples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from overhaul.interop.pixels import normalized, sized
from overhaul.method import Training
from overhaul.stream import Stream
from overhaul.tasks import TaskSequence

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCORED_AT_ONCE = 256
"""Held-out examples of a pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Labelled images as a model reads them: `(N, C, H, W)` of uint8, and `(N,)` places in the sequence's classes."""

    images_NCHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    processor: Any

    def __len__(self) -> int:
        return len(self.labels_N)

    def batch(self, places: NDArray[np.int64] | slice) -> dict[str, Tensor]:
        """`{"pixel_values": (B, C, H, W) float32, "labels": (B,) int64}` of some of them."""
        return {
            "pixel_values": normalized(self.images_NCHW[places], self.processor),
            "labels": torch.from_numpy(self.labels_N[places]),
        }

    def in_order(self) -> Iterator[dict[str, Tensor]]:
        """All of them once, in batches, as they stand."""
        for start in range(0, len(self), SCORED_AT_ONCE):
            yield self.batch(slice(start, start + SCORED_AT_ONCE))


class ShuffledBatches(Stream):
    """Batches without end, in a new order in every pass; the last one of a pass may be smaller.

    Args:
        examples: at least one.
        batch_size: examples of a batch.
        seed: of the orders.
        name: of the task.
        fingerprint: of its examples.
    """

    def __init__(self, examples: Examples, *, batch_size: int, seed: int, name: str, fingerprint: str) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.name, self.fingerprint = name, fingerprint
        self.restart(0)

    def __next__(self) -> dict[str, Tensor]:
        if self.cursor >= len(self.examples):
            self.restart(self.epoch + 1)
        places = self.order[self.cursor : self.cursor + self.batch_size]
        self.cursor += len(places)
        return self.examples.batch(places)

    def own_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.restart(state["epoch"])
        self.cursor = state["cursor"]

    def label(self) -> str:
        return f"{self.name} ({len(self.examples):,} examples, {self.fingerprint[:8]}), batches of {self.batch_size}"

    def restart(self, epoch: int) -> None:
        self.epoch, self.cursor = epoch, 0
        self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))


@dataclass(frozen=True)
class TaskData:
    """A task sequence with the image processor of the model that will learn it.

    Attributes:
        sequence: the tasks.
        processor: of the model.
        channels: of the images that the model reads.
        seed: of the orders.
        model: how the user called the model, for tables.
        dtype: of matrix products when something is measured.
    """

    sequence: TaskSequence
    processor: Any
    channels: int
    seed: int = 0
    model: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def corpus(self) -> TaskSequence:
        """What is read, by name and content: here all tasks."""
        return self.sequence

    @property
    def beside(self) -> Mapping[str, Any]:
        """Further corpora, of which there are none."""
        return {}

    def steps_for(self, settings: Training, *, processes: int = 1) -> Training:
        """The settings as they are: each task has steps of its own."""
        return settings

    @cached_property
    def train(self) -> tuple[Examples, ...]:
        """What each task is learnt on."""
        return tuple(self._seen(task.train.images_NHWC, task.train.labels_N) for task in self.sequence.tasks)

    @cached_property
    def heldout(self) -> tuple[Examples, ...]:
        """What each task is measured on."""
        return tuple(self._seen(task.heldout.images_NHWC, task.heldout.labels_N) for task in self.sequence.tasks)

    def num_heldout(self, number: int) -> int:
        """Examples that a task is measured on."""
        return len(self.sequence.tasks[number].heldout)

    def _seen(self, images_NHWC: NDArray[np.uint8], labels_N: NDArray[np.int64]) -> Examples:
        return Examples(sized(images_NHWC, self.processor, self.channels), labels_N, self.processor)

    def batches(
        self, number: int, *, batch_size: int, own_labels: bool = False, seed: int | None = None
    ) -> ShuffledBatches:
        """The training batches of a task, counted from 0.

        Args:
            number: of the task.
            batch_size: examples of a batch.
            own_labels: whether labels are places among the task's own classes, not among those of the sequence.
            seed: of the orders; None: one by the task's place in the sequence.
        """
        name = self.sequence.tasks[number].name
        key = hashlib.sha256(f"{self.sequence.fingerprint}\n{number}".encode()).hexdigest()
        # Each task has orders of its own, whatever came before it.
        seed = seed if seed is not None else self.seed * len(self.sequence.tasks) + number
        examples = self.train[number]
        if own_labels:
            classes = np.array(self.sequence.tasks[number].classes)
            examples = replace(examples, labels_N=np.searchsorted(classes, examples.labels_N))
        return ShuffledBatches(examples, batch_size=batch_size, seed=seed, name=name, fingerprint=key)

    def steps(self, number: int, *, passes: float, batch_size: int) -> int:
        """Steps of so many passes over a task's examples, at least one."""
        per_pass = math.ceil(len(self.train[number]) / batch_size)
        return max(1, math.ceil(passes * per_pass))
