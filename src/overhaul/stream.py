"""Streams compose, describe themselves, and can be saved in the middle.

A stream is an iterator with a state: `state_dict()` after any item and `load_state_dict()` in another process go on
with exactly the next item. Items are whatever the source yields: rows, encoded documents, windows, batches.

    Batch(Pack(Repeat(Shuffle(Rows(documents), seed=0)), seq_len=512), batch_size=4)
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from overhaul.ledger import Seen
    from overhaul.tokens import Tokens

IGNORED = -100
"""The label of a token that is not trained on."""


@dataclass(frozen=True, slots=True)
class Node:
    """What a stream is made of: one line of `tree()` per node.

    Attributes:
        name: the class and its settings.
        fingerprint: content hash of the node and all below it.
        tokens: how many tokens one pass holds, None where that is not known without reading.
    """

    name: str
    fingerprint: str
    tokens: int | None
    children: tuple[Node, ...] = ()

    def tree(self, indent: int = 0) -> str:
        """The node and its children, one a line, indented."""
        tokens = "" if self.tokens is None else f"  {self.tokens:,} tokens"
        lines = [f"{'  ' * indent}{self.name}  [{self.fingerprint[:8]}]{tokens}"]
        return "\n".join(lines + [child.tree(indent + 1) for child in self.children])


class Encoded(NamedTuple):
    """One document as tokens: `ids` (N,) int64 and, for each, whether it is trained on."""

    ids: np.ndarray
    trained: np.ndarray


class Drawn(NamedTuple):
    """What a mixture has taken from one source.

    Attributes:
        name: of the source.
        tokens: so many.
        asked: so many would have been its exact shares.
        passes: over the source, where its length is known.
    """

    name: str
    tokens: int
    asked: float
    passes: float | None


class Counted(Protocol):
    """A stream of documents that have numbers.

    Attributes:
        held: all of them.
        number: of the one that came last.
    """

    held: Tokens

    @property
    def number(self) -> int: ...


def padded(document: Encoded, width: int) -> dict[str, torch.Tensor]:
    """A document alone in a window, filled up on the right, where a causal model does not look and nothing is trained.

    Returns:
        `{"input_ids": (width,), "labels": (width,)}` int64, as `Pack` yields them.
    """
    gap = width - len(document.ids)
    labels = np.where(document.trained, document.ids, IGNORED)
    return {
        "input_ids": torch.from_numpy(np.pad(document.ids, (0, gap))),
        "labels": torch.from_numpy(np.pad(labels, (0, gap), constant_values=IGNORED)),
    }


class Stream(ABC, Iterator[Any]):
    """An iterator with a state. Subclasses are finished classes: they are composed, never extended."""

    sources: tuple[Stream, ...] = ()

    @abstractmethod
    def __next__(self) -> Any:
        """The next item; raises `StopIteration` at the end of a finite stream."""

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """The state of this node without its sources."""

    @abstractmethod
    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `own_state` returned."""

    @abstractmethod
    def label(self) -> str:
        """The class and its settings, as shown by `describe`."""

    def tokens(self) -> int | None:
        """Tokens in one pass, where known."""
        return self.sources[0].tokens() if len(self.sources) == 1 else None

    def ledger(self) -> tuple[Drawn, ...]:
        """What each source of a mixture has given so far; empty where nothing is mixed."""
        return tuple(drawn for source in self.sources for drawn in source.ledger())

    def counted(self) -> Counted | None:
        """Where the documents come from, one after the other, if they have numbers there."""
        return self.sources[0].counted() if len(self.sources) == 1 else None

    def seen(self) -> tuple[Seen, ...]:
        """How many tokens of which documents went out in windows, since `count_anew`."""
        return tuple(seen for source in self.sources for seen in source.seen())

    def count_anew(self) -> None:
        """Begins to count what `seen` tells."""
        for source in self.sources:
            source.count_anew()

    def restart(self, epoch: int) -> None:
        """Back to the first item; a shuffled stream takes the order of that epoch."""
        for source in self.sources:
            source.restart(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, as plain data and tensors."""
        return {"own": self.own_state(), "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state_dict` was taken; the stream must be composed alike."""
        self.load_own_state(state["own"])
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)

    def describe(self) -> Node:
        """The stream as a tree with a content hash and a token count at each node."""
        children = tuple(source.describe() for source in self.sources)
        content = "\n".join([self.label(), *(child.fingerprint for child in children)])
        return Node(self.label(), hashlib.sha256(content.encode()).hexdigest(), self.tokens(), children)


class Rows(Stream):
    """The items of a sequence, in order."""

    def __init__(self, items: Sequence[Any], *, name: str, fingerprint: str, tokens: int | None = None) -> None:
        self.items, self.name, self.fingerprint, self._tokens = items, name, fingerprint, tokens
        self.order: Sequence[int] = range(len(items))
        self.cursor = 0

    def __next__(self) -> Any:
        if self.cursor >= len(self.order):
            raise StopIteration
        self.cursor += 1
        return self.items[self.order[self.cursor - 1]]

    def own_state(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.cursor = state["cursor"]

    def label(self) -> str:
        return f"{self.name} ({len(self.items):,} rows, {self.fingerprint[:8]})"

    def tokens(self) -> int | None:
        return self._tokens

    def restart(self, epoch: int) -> None:
        self.cursor = 0


class Shuffle(Stream):
    """The rows of a source in an order drawn from the seed and the epoch."""

    def __init__(self, source: Rows, *, seed: int) -> None:
        self.sources, self.rows, self.seed = (source,), source, seed
        self.restart(0)

    def __next__(self) -> Any:
        return next(self.rows)

    def own_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.restart(state["epoch"])

    def label(self) -> str:
        return f"shuffle(seed={self.seed})"

    def restart(self, epoch: int) -> None:
        self.epoch = epoch
        self.rows.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows.items)).tolist()
        self.rows.restart(epoch)


class Repeat(Stream):
    """A finite source again and again: `times` passes, or without end."""

    def __init__(self, source: Stream, *, times: int | None = None) -> None:
        self.sources, self.times, self.epoch = (source,), times, 0

    def __next__(self) -> Any:
        try:
            return next(self.sources[0])
        except StopIteration:
            if self.times is not None and self.epoch + 1 >= self.times:
                raise
        self.epoch += 1
        self.sources[0].restart(self.epoch)
        return next(self.sources[0])

    def own_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]

    def label(self) -> str:
        return "repeat" if self.times is None else f"repeat({self.times})"

    def restart(self, epoch: int) -> None:
        self.epoch = epoch
        super().restart(epoch)


class Map(Stream):
    """Each item through a function without state."""

    def __init__(self, source: Stream, function: Callable[[Any], Any], *, name: str) -> None:
        self.sources, self.function, self.name = (source,), function, name

    def __next__(self) -> Any:
        return self.function(next(self.sources[0]))

    def own_state(self) -> dict[str, Any]:
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        pass

    def label(self) -> str:
        return self.name


class Pack(Stream):
    """Encoded documents joined end to end and cut into windows of `seq_len` tokens.

    Yields `{"input_ids": (T,), "labels": (T,)}` int64 tensors; labels are aligned with the inputs (the objective
    shifts them) and `IGNORED` where a token is not trained on. A last, shorter window is left out.

    With a document mask there are `"position_ids": (T,)` too, int64, which are 0 again where a document begins, and so
    tell a model where attention has to end; a document's first token, which nothing before it predicts, is not trained
    on. A document that is cut at the end of a window goes on in the next one at position 0, as if it began there.

    Of documents that have numbers the tokens that went out are counted, for `seen`.
    """

    def __init__(self, source: Stream, *, seq_len: int, document_mask: bool = False) -> None:
        self.sources, self.seq_len, self.document_mask = (source,), seq_len, document_mask
        self.held = {"ids": np.zeros(0, np.int64), "labels": np.zeros(0, np.int64)}
        if document_mask:
            self.held["begins"] = np.zeros(0, bool)
        self.below = source.counted()
        # Of each document that is held, its number and how many of its tokens are.
        self.runs: deque[tuple[int, int]] = deque()
        self.given_D = np.zeros(len(self.below.held) if self.below else 0, np.int64)

    def __next__(self) -> dict[str, torch.Tensor]:
        parts, count = {name: [part] for name, part in self.held.items()}, len(self.held["ids"])
        while count < self.seq_len:
            document = next(self.sources[0])
            for name, part in self._parts(document).items():
                parts[name].append(part)
            count += len(document.ids)
        if len(parts["ids"]) > 1:  # a long document is not copied for each of its windows
            self.held = {name: np.concatenate(pieces) for name, pieces in parts.items()}
        cut = {name: part[: self.seq_len] for name, part in self.held.items()}
        self.held = {name: part[self.seq_len :] for name, part in self.held.items()}
        self._count()
        window = {"input_ids": cut["ids"].copy(), "labels": cut["labels"].copy()}
        if self.document_mask:
            window["position_ids"] = _positions(cut["begins"])
        return {name: torch.from_numpy(part) for name, part in window.items()}

    def _parts(self, document: Encoded) -> dict[str, np.ndarray]:
        if self.below:
            self.runs.append((self.below.number, len(document.ids)))
        if not self.document_mask:
            return {"ids": document.ids, "labels": np.where(document.trained, document.ids, IGNORED)}
        begins = np.arange(len(document.ids)) == 0
        labels = np.where(document.trained & ~begins, document.ids, IGNORED)
        return {"ids": document.ids, "labels": labels, "begins": begins}

    def _count(self) -> None:
        """Takes the tokens of a window off the documents that are held."""
        left = self.seq_len if self.below else 0
        while left:
            number, length = self.runs.popleft()
            taken = min(left, length)
            self.given_D[number] += taken
            left -= taken
            if taken < length:
                self.runs.appendleft((number, length - taken))

    def seen(self) -> tuple[Seen, ...]:
        return self.below.held.seen(self.given_D) if self.below else ()

    def count_anew(self) -> None:
        self.given_D = np.zeros_like(self.given_D)

    def own_state(self) -> dict[str, Any]:
        counted = {"given": self.given_D, "runs": np.array(self.runs, np.int64).reshape(-1, 2)}
        parts = self.held | (counted if self.below else {})
        return {name: torch.from_numpy(part.copy()) for name, part in parts.items()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.held = {name: state[name].numpy().copy() for name in self.held}
        if self.below:
            self.given_D = state["given"].numpy().copy()
            self.runs = deque((number, length) for number, length in state["runs"].tolist())

    def label(self) -> str:
        return f"pack({self.seq_len}{', document mask' if self.document_mask else ''})"

    def restart(self, epoch: int) -> None:
        self.held = {name: part[:0] for name, part in self.held.items()}
        self.runs.clear()
        super().restart(epoch)


def _positions(begins: np.ndarray) -> np.ndarray:
    """Of each token the distance to the nearest place at or before it where a document begins, or to the window's."""
    places = np.arange(len(begins))
    return places - np.maximum.accumulate(np.where(begins, places, 0))


class Take(Stream):
    """The first `count` items."""

    def __init__(self, source: Stream, count: int) -> None:
        self.sources, self.count, self.taken = (source,), count, 0

    def __next__(self) -> Any:
        if self.taken >= self.count:
            raise StopIteration
        item = next(self.sources[0])
        self.taken += 1
        return item

    def own_state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]

    def label(self) -> str:
        return f"take({self.count})"

    def tokens(self) -> int | None:
        return None

    def restart(self, epoch: int) -> None:
        self.taken = 0
        super().restart(epoch)


def named(start: str, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch as a part of another one: `labels` of the part `memory` is `memory/labels` there."""
    return {f"{start}/{name}": tensor for name, tensor in batch.items()}


def part(batch: Mapping[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    """A part of a batch, as `named` put it there, as a batch of its own; empty where there is none."""
    return {name.removeprefix(f"{start}/"): t for name, t in batch.items() if name.startswith(f"{start}/")}


def num_tokens(item: Any) -> int:
    """Tokens of an encoded document or a window."""
    return len(item.ids if isinstance(item, Encoded) else item["input_ids"])


def num_items(batch: Mapping[str, torch.Tensor], unit: str = "tokens") -> int:
    """What a micro-batch is counted by: tokens where it has some and they are what is counted, else examples."""
    ids = batch.get("input_ids")
    return ids.numel() if ids is not None and unit == "tokens" else len(next(iter(batch.values())))


class Batch(Stream):
    """`batch_size` items stacked: each tensor gains a leading axis. A last, smaller batch is left out."""

    def __init__(self, source: Stream, *, batch_size: int) -> None:
        self.sources, self.batch_size = (source,), batch_size

    def __next__(self) -> dict[str, torch.Tensor]:
        items = [next(self.sources[0]) for _ in range(self.batch_size)]
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}

    def own_state(self) -> dict[str, Any]:
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        pass

    def label(self) -> str:
        return f"batch({self.batch_size})"
