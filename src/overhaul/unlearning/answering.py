"""What a model answers with that examples can be deleted from, and so what a stage learns of an example.

Letters of shapes: T tokens of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from overhaul.documents import Row
from overhaul.objective import CrossEntropy, Term
from overhaul.stream import Encoded, padded

if TYPE_CHECKING:
    from overhaul.data import Data

Content = dict[str, Tensor]
"""What the model reads at once, without a leading axis, and `labels`."""


class Answering(ABC):
    """How examples are read, each by itself, and what is learnt of them."""

    @abstractmethod
    def contents(self, rows: Sequence[Row]) -> Iterator[list[Content]]:
        """Of each example what is read of it, in one or more windows; none depends on another example."""

    @abstractmethod
    def loss(self) -> Term:
        """Cross-entropy."""


class ByWord(Answering):
    """A language model: it learns the next token of every window, which is as wide as all others.

    Args:
        data: with the tokenizer.
        seq_len: T.
    """

    def __init__(self, data: Data, seq_len: int) -> None:
        self.data, self.seq_len = data, seq_len

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
