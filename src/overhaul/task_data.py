"""A task sequence as one model sees it: pixels or tokens, batches, held-out examples."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from overhaul.augment import IMAGES, Augmenting, Named, Policy, policy
from overhaul.errors import UserError
from overhaul.images import Labelled
from overhaul.interop.pixels import normalized, sized
from overhaul.labelled_texts import LabelledTexts
from overhaul.method import Training
from overhaul.progress import say
from overhaul.stream import Stream
from overhaul.tasks import TaskSequence

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCORED_AT_ONCE = 256
"""Held-out examples of a pass."""


class Batched(ABC):
    """Labelled examples as a model reads them."""

    labels_N: NDArray[np.int64]
    """Places in the sequence's classes."""
    at_once: ClassVar[int] = SCORED_AT_ONCE
    """Examples of a pass that only reads them."""

    def __len__(self) -> int:
        return len(self.labels_N)

    @abstractmethod
    def inputs(self, places: NDArray[np.int64] | slice) -> dict[str, Tensor]:
        """What the model reads of some of them."""

    def batch(self, places: NDArray[np.int64] | slice) -> dict[str, Tensor]:
        """`inputs` and `labels`, `(B,)` int64, of some of them."""
        return {**self.inputs(places), "labels": torch.from_numpy(self.labels_N[places])}

    def in_order(self, places: NDArray[np.int64] | None = None) -> Iterator[dict[str, Tensor]]:
        """Some of them once, in batches, as they are named; None for all, as they stand."""
        for start in range(0, len(self) if places is None else len(places), self.at_once):
            here = slice(start, start + self.at_once)
            yield self.batch(here if places is None else places[here])


@dataclass(frozen=True, slots=True, eq=False)
class Examples(Batched):
    """Images: `(N, C, H, W)` of uint8."""

    images_NCHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    processor: Any

    def inputs(self, places: NDArray[np.int64] | slice) -> dict[str, Tensor]:
        """`{"pixel_values": (B, C, H, W) float32}`."""
        return {"pixel_values": normalized(self.images_NCHW[places], self.processor)}

    def as_bytes(self) -> ImageBytes:
        """The same before they are what the model reads."""
        return ImageBytes(self.images_NCHW, self.labels_N)


@dataclass(frozen=True, slots=True, eq=False)
class ImageBytes(Batched):
    """Images that are augmented before a model reads them: `(N, C, H, W)` of uint8."""

    images_NCHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]

    def inputs(self, places: NDArray[np.int64] | slice) -> dict[str, Tensor]:
        """`{"images": (B, C, H, W) uint8}`."""
        return {IMAGES: torch.from_numpy(self.images_NCHW[places])}


@dataclass(frozen=True, slots=True, eq=False)
class TextExamples(Batched):
    """Texts as tokens, all filled up on the right to one width: `(N, T)`."""

    ids_NT: NDArray[np.int64]
    mask_NT: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    at_once: ClassVar[int] = 32

    def inputs(self, places: NDArray[np.int64] | slice) -> dict[str, Tensor]:
        """`{"input_ids": (B, T) int64, "attention_mask": (B, T) int64}`."""
        return {
            "input_ids": torch.from_numpy(self.ids_NT[places]),
            "attention_mask": torch.from_numpy(self.mask_NT[places]),
        }


def encoded(part: LabelledTexts, tokenizer: Any, width: int) -> TextExamples:
    """Texts as the tokenizer makes them by itself, cut at the end to a width.

    Padding at their ends is no token of theirs: a classifier reads a text at its last token that is no padding.

    Args:
        part: the texts.
        tokenizer: with a padding token.
        width: tokens that are read.

    Raises:
        UserError: of a text nothing is left.
    """
    pad = tokenizer.pad_token_id
    told = tokenizer(list(part.texts), truncation=True, max_length=width, verbose=False)["input_ids"]
    ids_NT = np.full((len(part), width), pad, np.int64)
    mask_NT = np.zeros((len(part), width), np.int64)
    for row, own in enumerate(told):
        while own and own[-1] == pad:
            own.pop()
        if not own:
            raise UserError(f"the text {part.texts[row][:40]!r} has no token that is no padding", allowed="other text")
        ids_NT[row, : len(own)], mask_NT[row, : len(own)] = own, 1
    return TextExamples(ids_NT, mask_NT, part.labels_N)


class ShuffledBatches(Stream):
    """Batches without end, in a new order in every pass; the last one of a pass may be smaller.

    Args:
        examples: at least one.
        batch_size: examples of a batch.
        seed: of the orders.
        name: of the task.
        fingerprint: of its examples.
    """

    def __init__(self, examples: Batched, *, batch_size: int, seed: int, name: str, fingerprint: str) -> None:
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
    """A task sequence with the image processor, or the tokenizer, of the model that will learn it.

    Attributes:
        sequence: the tasks.
        processor: of the model.
        extent: how much of an example the model reads: channels of an image, or tokens of a text.
        seed: of the orders.
        model: how the user called the model, for tables.
        dtype: of matrix products when something is measured.
    """

    sequence: TaskSequence
    processor: Any
    extent: int
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
    def train(self) -> tuple[Any, ...]:
        """What each task is learnt on: `Examples`, or `TextExamples`."""
        found = tuple(self._seen(task.train) for task in self.sequence.tasks)
        texts = [one for one in found if isinstance(one, TextExamples)]
        if full := sum(int(one.mask_NT.all(axis=1).sum()) for one in texts):
            total = sum(map(len, texts))
            say(f"note: {full:,} of {total:,} texts reach --seq-len {self.extent} tokens, and are read to there")
        return found

    @cached_property
    def heldout(self) -> tuple[Any, ...]:
        """What each task is measured on: `Examples`, or `TextExamples`."""
        return tuple(self._seen(task.heldout) for task in self.sequence.tasks)

    @cached_property
    def aside(self) -> tuple[Any, ...]:
        """What is chosen by of each task that has examples aside: `Examples`, or `TextExamples`."""
        return tuple(self._seen(task.aside) for task in self.sequence.tasks if task.aside is not None)

    def num_heldout(self, number: int) -> int:
        """Examples that a task is measured on."""
        return len(self.sequence.tasks[number].heldout)

    def _seen(self, part: Labelled | LabelledTexts) -> Batched:
        if isinstance(part, LabelledTexts):
            return encoded(part, self.processor, self.extent)
        return Examples(sized(part.images_NHWC, self.processor, self.extent), part.labels_N, self.processor)

    def batches(
        self,
        number: int,
        *,
        batch_size: int,
        own_labels: bool = False,
        as_bytes: bool = False,
        seed: int | None = None,
    ) -> ShuffledBatches:
        """The training batches of a task, counted from 0.

        Args:
            number: of the task.
            batch_size: examples of a batch.
            own_labels: whether labels are places among the task's own classes, not among those of the sequence.
            as_bytes: whether images come as `augmented` reads them, and not yet as the model does.
            seed: of the orders; None: one by the task's place in the sequence.
        """
        name = self.sequence.tasks[number].name
        key = hashlib.sha256(f"{self.sequence.fingerprint}\n{number}".encode()).hexdigest()
        examples = self.train[number]
        if own_labels:
            classes = np.array(self.sequence.tasks[number].classes)
            examples = replace(examples, labels_N=np.searchsorted(classes, examples.labels_N))
        examples = examples.as_bytes() if as_bytes else examples
        seed = self._seed_of(number) if seed is None else seed
        return ShuffledBatches(examples, batch_size=batch_size, seed=seed, name=name, fingerprint=key)

    def augmented(
        self, source: Stream, number: int, name: Named, *, offers: bool = False, seed: int | None = None
    ) -> Augmenting:
        """A task's batches as the model reads them, every image augmented anew whenever it comes.

        Args:
            source: batches with images as bytes.
            number: of the task.
            name: as in `policy`.
            offers: as in `Augmenting`.
            seed: of what is drawn; None: one by the task's place in the sequence.
        """
        seed = self._seed_of(number) if seed is None else seed
        return Augmenting(source, self.policy(number, name), processor=self.processor, seed=seed, offers=offers)

    def policy(self, number: int, name: Named) -> Policy:
        """How far images of a task are changed; `auto` goes by whether they are grey, whatever the model reads."""
        train = self.sequence.tasks[number].train
        assert isinstance(train, Labelled), "texts are refused before"
        return policy(name, train.images_NHWC.shape[-1])

    def _seed_of(self, number: int) -> int:
        """Each task has orders of its own, whatever came before it."""
        return self.seed * len(self.sequence.tasks) + number

    def steps(self, number: int, *, passes: float, batch_size: int) -> int:
        """Steps of so many passes over a task's examples, at least one."""
        per_pass = math.ceil(len(self.train[number]) / batch_size)
        return max(1, math.ceil(passes * per_pass))
