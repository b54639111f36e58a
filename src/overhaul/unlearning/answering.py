"""What a model answers with that examples can be deleted from, words or classes, and so what a stage learns of them.

Letters of shapes: D model width, T tokens of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from overhaul.artifact import Artifact
from overhaul.documents import Row
from overhaul.errors import UserError, did_you_mean
from overhaul.interop.classifier import can_pad, classes_of, head_of, set_classes, with_head
from overhaul.kinds import Kind
from overhaul.labelled_texts import LabelledTexts
from overhaul.objective import ClassCrossEntropy, CrossEntropy, Term
from overhaul.progress import say
from overhaul.stream import Encoded, padded
from overhaul.task_data import encoded

if TYPE_CHECKING:
    from overhaul.data import Data
    from overhaul.picture_data import PictureData

Content = Mapping[str, Tensor]
"""What the model reads at once, without a leading axis, and `labels`; of an image its bytes."""
LISTED = 20
"""Classes that an error names."""


class Answering(ABC):
    """How examples are read, each by itself, and what is learnt of them.

    Args:
        model: what learns them.
        data: with the tokenizer, or the image processor.
        seq_len: T.

    Attributes:
        head: name of the head that every stage has its own of; empty for a language model.
        unit: what is counted.
        together: the tag whose value decides about the slice, where the user names none; None: the content alone.
    """

    head: str = ""
    unit: ClassVar[str] = "tokens"
    together: ClassVar[str | None] = None

    def __init__(self, model: nn.Module, data: Any, seq_len: int) -> None:
        self.data, self.seq_len = data, seq_len

    @abstractmethod
    def contents(self, rows: Sequence[Any]) -> Iterator[list[Content]]:
        """Of each example what is kept of it, in one or more windows; none depends on another example."""

    def alone(self, content: Content) -> Content:
        """What the model reads of a window that is by itself."""
        return content

    def filled(self, content: Content) -> Content:
        """What it reads of one in a batch, as wide as all others."""
        return self.alone(content)

    def settings(self) -> dict[str, Any]:
        """How an example is read of a file, plain data."""
        spec = self.data.corpus.spec
        return {"field": spec.field if spec else None}

    @abstractmethod
    def loss(self) -> Term:
        """Cross-entropy."""


class ByWord(Answering):
    """A language model learns the next token of every window."""

    data: Data

    def contents(self, rows: Sequence[Row]) -> Iterator[list[Content]]:
        """`{"input_ids": (T,), "labels": (T,)}` int64; the last window of an example is filled up."""
        width = self.seq_len
        for row in rows:
            document = self.data.encode(row)
            parts = (
                Encoded(document.ids[at : at + width], document.trained[at : at + width])
                for at in range(0, len(document.ids), width)
            )
            yield [padded(part, width) for part in parts if part.trained[1:].any()]

    def loss(self) -> Term:
        return CrossEntropy()


class ByClass(Answering):
    """A classifier learns the class of a text, of which it reads so many tokens."""

    data: Data

    def __init__(self, model: nn.Module, data: Data, seq_len: int) -> None:
        super().__init__(model, data, seq_len)
        self.head = head_of(model)[0]
        self.places = {name: place for place, name in enumerate(classes_of(model))}

    def contents(self, rows: Sequence[Row]) -> Iterator[list[Content]]:
        """`{"input_ids": (t,), "attention_mask": (t,), "labels": ()}` int64, of each text one, t up to T."""
        labels_N = np.array([self.places[row.label] for row in rows], np.int64)
        part = LabelledTexts(texts=tuple(row["text"] for row in rows), labels_N=labels_N)
        read = encoded(part, self.data.tokenizer, self.seq_len)
        for number, length in enumerate(read.mask_NT.sum(axis=1)):
            inputs = {name: tensor[0, :length] for name, tensor in read.inputs(slice(number, number + 1)).items()}
            yield [{**inputs, "labels": torch.tensor(labels_N[number])}]

    def filled(self, content: Content) -> Content:
        """With padding on the right, which the mask tells; it says nothing of the text."""
        gap = self.seq_len - len(content["input_ids"])
        fill = {"input_ids": self.data.tokenizer.pad_token_id}
        return {
            name: pad(tensor, (*[0] * (2 * tensor.dim() - 2), 0, gap), value=fill.get(name, 0))
            if tensor.dim()
            else tensor
            for name, tensor in content.items()
        }

    def loss(self) -> Term:
        return ClassCrossEntropy()


def with_classes(made: Artifact, declared: Sequence[str]) -> Artifact:
    """A model that tells classes: a language model or an encoder gets a head for those that are declared.

    So does a classifier of images, of which most were trained on other classes; of texts it keeps its own. A new head
    is zero: it says nothing, and nothing of the data; each stage has its own.

    Args:
        made: the model.
        declared: names of the classes; none for a classifier that keeps its own.

    Raises:
        UserError: none are declared where the model has none, others than it has, or it has one alone.
    """
    of_images = made.kind is Kind.IMAGE_CLASSIFIER
    if of_images or made.kind is Kind.TEXT_CLASSIFIER:
        known = classes_of(made.model)
        if of_images and declared and tuple(declared) != known:
            say(f"note: {made.name} has other classes than those that are declared: its head is put aside")
            _name(made.model, declared)
        elif declared and tuple(declared) != known:
            raise UserError(
                f"--classes {' '.join(declared)} are not those of {made.name}",
                allowed=f"{_listed(known)}, in this order",
                hint="without --classes",
            )
        if len(classes_of(made.model)) < 2:
            raise UserError(f"{made.name} has one class alone", allowed="a classifier of two or more")
    else:
        if not declared:
            raise UserError(
                f"{made.name} has no classes, and none are declared: which there are must not depend on the data",
                allowed="--classes with all of them, also those that have no example",
            )
        made = replace(made, model=with_head(made.model))
        _name(made.model, declared)
    if not of_images:
        can_pad(made.model, made.processor)
    return made


def _name(model: nn.Module, classes: Sequence[str]) -> None:
    """Gives the model a head of zeros for these."""
    set_classes(model, tuple(classes))
    for parameter in head_of(model)[1].parameters():
        nn.init.zeros_(parameter)


def refuse_other_labels(model: nn.Module, data: Data | PictureData) -> None:
    """Raises `UserError` where an example has a label that is none of the model's classes."""
    known = classes_of(model)
    other = [row.label for row in data.corpus.train if row.label not in known]
    if other:
        raise UserError(
            f"{len(other):,} of {len(data.corpus.train):,} examples have a label that is none of the classes, such as "
            f"{other[0]!r}",
            allowed=_listed(known),
            hint=did_you_mean(other[0], known),
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
