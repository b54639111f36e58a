"""A sequence of corpora as one language model sees it: windows, batches, what it says of held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from overhaul import machine
from overhaul.corpora import Corpus
from overhaul.data import Data
from overhaul.documents import row_text
from overhaul.errors import UserError
from overhaul.interop import hf
from overhaul.method import Training
from overhaul.stream import IGNORED, Encoded, Stream, padded
from overhaul.text_tasks import TextSequence


class Said(NamedTuple):
    """What a model says of held-out text.

    Attributes:
        right_N: of each example from 0 to 1: of an answer whether all of it is what the model would write, of plain
            text the share of tokens that it would write next.
        nll_N: nats a token, of those that are trained on.
    """

    right_N: Tensor
    nll_N: Tensor


def asked(ids_T: Tensor, is_trained_T: Tensor) -> Tensor:
    """Of a text what it is known by: what stands before its answer; all of it where there is no question."""
    first = int(is_trained_T.int().argmax())
    return ids_T[:first] if first > 1 else ids_T


@dataclass(frozen=True)
class TextTaskData:
    """A sequence of corpora with the tokenizer of the model that will learn them.

    Attributes:
        sequence: the tasks.
        processor: the tokenizer.
        seq_len: tokens of a window.
        seed: of the orders.
        model: how the user called the model, for tables.
        dtype: of matrix products when something is measured.
        measured: held-out examples of each task, at most.
    """

    sequence: TextSequence
    processor: Any
    seq_len: int
    seed: int = 0
    model: str = ""
    dtype: torch.dtype = torch.float32
    measured: int = 64

    @property
    def corpus(self) -> TextSequence:
        """What is read, by name and content: here all tasks."""
        return self.sequence

    @property
    def beside(self) -> Mapping[str, Corpus]:
        """Further corpora, of which there are none."""
        return {}

    def steps_for(self, settings: Training, *, processes: int = 1) -> Training:
        """The settings as they are: each task has steps of its own."""
        return settings

    @cached_property
    def of(self) -> tuple[Data, ...]:
        """Each task's corpus as the model reads it; each has orders of its own, whatever came before it."""
        count = len(self.sequence.tasks)
        return tuple(
            Data(task.corpus, self.processor, self.seed * count + number, model=self.model, dtype=self.dtype)
            for number, task in enumerate(self.sequence.tasks)
        )

    def has_answers(self, number: int) -> bool:
        """Whether a task's rows are questions with answers, each read alone; else text, cut into windows."""
        return any(not is_trained for _, is_trained in row_text(self.sequence.tasks[number].corpus.heldout[0]))

    @cached_property
    def _ordered(self) -> dict[tuple[int, int], Data]:
        return {}

    def batches(self, number: int, settings: Training, *, seed: int | None = None) -> Stream:
        """The training batches of a task, counted from 0.

        Args:
            number: of the task.
            settings: of the windows and batches.
            seed: of their order; None for one that depends on the task's place in the sequence.
        """
        data = self.of[number]
        if seed is not None:
            # The same object each time, so that nothing is encoded twice.
            data = self._ordered.setdefault((number, seed), replace(data, seed=seed))
        return data.examples(settings) if self.has_answers(number) else data.training(settings)

    def steps(self, number: int, *, passes: float, batch_size: int) -> int:
        """Steps of so many passes over a task's text, at least one."""
        data = self.of[number]
        rows = len(data.corpus.train)
        windows = rows if self.has_answers(number) else data.num_training_tokens / self.seq_len
        return max(1, round(passes * windows / batch_size))

    @cached_property
    def heldout(self) -> tuple[tuple[Encoded, ...], ...]:
        """What each task is measured on, as tokens."""
        return tuple(self._heldout(number) for number in range(len(self.sequence.tasks)))

    def _heldout(self, number: int) -> tuple[Encoded, ...]:
        data = self.of[number]
        if not self.has_answers(number):
            windows_NT = data.windows("heldout", seq_len=self.seq_len, limit=self.measured)
            return tuple(Encoded(ids_T.numpy(), np.ones(len(ids_T), bool)) for ids_T in windows_NT)
        found = [one for one in data.encoded(data.corpus.heldout[: self.measured]) if len(one.ids) <= self.seq_len]
        if not found:
            raise UserError(
                f"every held-out row of {data.corpus.name} is longer than --seq-len {self.seq_len}",
                allowed="shorter rows, or a longer --seq-len",
            )
        return tuple(found)

    def asked(self, number: int) -> list[Tensor]:
        """Of what a task is measured on, the tokens that each text is known by."""
        return [asked(torch.from_numpy(one.ids), torch.from_numpy(one.trained)) for one in self.heldout[number]]

    def num_heldout(self, number: int) -> int:
        """Examples that a task is measured on."""
        return len(self.heldout[number])

    @torch.no_grad()
    def said(self, model: nn.Module, number: int, before: Callable[[int], None] = lambda _: None) -> Said:
        """What a model says of a task's held-out text; the model is left in evaluation mode.

        Args:
            model: a causal language model.
            number: of the task, from 0.
            before: called with the number of each example before the model reads it.
        """
        device = next(model.parameters()).device
        model.eval()
        right, nll = [], []
        for place, one in enumerate(self.heldout[number]):
            before(place)
            window = {name: tensor[None].to(device) for name, tensor in padded(one, len(one.ids)).items()}
            labels_N = window["labels"][0, 1:]
            with machine.autocast(device, self.dtype):
                logits_NV = hf.logits(model, window)[0, :-1][labels_N != IGNORED].float()
            labels_N = labels_N[labels_N != IGNORED]
            hits_N = logits_NV.argmax(dim=1) == labels_N
            right.append(float(hits_N.all()) if self.has_answers(number) else float(hits_N.double().mean()))
            nll.append(float(nn.functional.cross_entropy(logits_NV, labels_N)))
        return Said(torch.tensor(right), torch.tensor(nll))
