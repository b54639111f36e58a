"""Documents as tokens, cut into shards: in memory, or mapped from files so that memory does not grow with them.

Letters of shapes: N tokens, D documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overhaul import disk
from overhaul.documents import Row
from overhaul.errors import UserError
from overhaul.ledger import Origin, Seen, merged
from overhaul.stream import Encoded, Stream

SHARD_TOKENS = 10_000_000
"""Of a shard, at most; a document that is longer makes one of its own (Chen et al., 2024, have the same 0.01B)."""
ROWS_AT_ONCE = 256
"""Encoded in one call: so many are in memory beside the shard that is being filled."""
OPEN_SHARDS = 64
"""Whose files are open at once where documents are read across shards."""
MANIFEST, VERSION = "tokens.json", 2

Encode = Callable[[Sequence[Row]], Sequence[Encoded]]


@dataclass(frozen=True, slots=True)
class Shard:
    """Some documents, one after the other.

    Attributes:
        ids_N: of the tokens, unsigned.
        ends_D: where each document ends.
        documents_D: hash of each as it stands in the corpus (`Row.document`), uint64.
        trained_N: whether each token is trained on; None where all are.
    """

    ids_N: np.ndarray
    ends_D: np.ndarray
    documents_D: np.ndarray
    trained_N: np.ndarray | None

    @classmethod
    def of(cls, documents: Sequence[Encoded], hashes: Sequence[int]) -> Shard:
        """Puts documents together."""
        if not documents:
            return cls(np.zeros(0, np.uint16), np.zeros(0, np.int64), np.zeros(0, np.uint64), None)
        ids_N, trained_N = (np.concatenate([document[part] for document in documents]) for part in (0, 1))
        narrow = np.uint16 if ids_N.max(initial=0) <= np.iinfo(np.uint16).max else np.uint32
        ends_D = np.cumsum([len(document.ids) for document in documents])
        hashes_D = np.array(hashes, np.uint64)
        return cls(ids_N.astype(narrow), ends_D, hashes_D, None if trained_N.all() else trained_N)

    def __len__(self) -> int:
        return len(self.ends_D)

    def __getitem__(self, place: int) -> Encoded:
        first, end = int(self.ends_D[place - 1]) if place else 0, int(self.ends_D[place])
        trained = np.ones(end - first, bool) if self.trained_N is None else np.array(self.trained_N[first:end])
        return Encoded(self.ids_N[first:end].astype(np.int64), trained)

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return len(self.ids_N)

    def opened(self) -> Shard:
        """Itself."""
        return self


@dataclass(frozen=True, slots=True)
class ShardOnDisk:
    """A shard whose files are open only while somebody has what `opened` returned.

    Attributes:
        stem: the files without their endings.
        count: of documents.
        num_tokens: of all documents.
    """

    stem: Path
    count: int
    num_tokens: int

    def __len__(self) -> int:
        return self.count

    def opened(self) -> Shard:
        """The shard with its arrays mapped from the files.

        Raises:
            ValueError: they are not as long as they were.
        """
        ids, ends, documents, trained = (
            self.stem.with_name(f"{self.stem.name}.{part}.npy") for part in ("ids", "ends", "documents", "trained")
        )
        shard = Shard(_map(ids), _map(ends), _map(documents), _map(trained) if trained.is_file() else None)
        if (len(shard), shard.num_tokens) != (self.count, self.num_tokens):
            raise ValueError(f"{self.stem.name} has another length than the manifest says")
        return shard


def _map(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A corpus as one tokenizer reads it.

    Attributes:
        name: for people.
        fingerprint: hash of the text and of what encoded it.
        shards: in the order of the text.
        origin: how the corpus was read, for the ledger; None where nobody keeps one.
    """

    name: str
    fingerprint: str
    shards: tuple[Shard | ShardOnDisk, ...]
    origin: Origin | None = None

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    @property
    def num_tokens(self) -> int:
        """Of one pass."""
        return sum(shard.num_tokens for shard in self.shards)

    def lengths(self) -> np.ndarray:
        """Tokens of each document (D,)."""
        lengths = [np.diff(shard.opened().ends_D, prepend=0) for shard in self.shards]
        return np.concatenate([np.zeros(0, np.int64), *lengths])

    @property
    def begins(self) -> np.ndarray:
        """The number of each shard's first document, and that of all documents."""
        return np.cumsum([0, *map(len, self.shards)])

    def seen(self, given_D: np.ndarray) -> tuple[Seen, ...]:
        """What a ledger says of documents of which so many tokens were given."""
        if self.origin is None:
            return ()
        hashes = [np.asarray(shard.opened().documents_D) for shard in self.shards]
        return merged([Seen(self.origin, np.concatenate([np.zeros(0, np.uint64), *hashes]), given_D)])


def in_memory(
    rows: Iterable[Row], encode: Encode, *, name: str, fingerprint: str, origin: Origin | None = None
) -> Tokens:
    """Encodes rows and keeps all of them."""
    return Tokens(name, fingerprint, tuple(_shards(rows, encode)), origin)


def on_disk(
    rows: Iterable[Row],
    encode: Encode,
    directory: Path,
    *,
    name: str,
    fingerprint: str,
    origin: Origin | None = None,
) -> Tokens:
    """Encodes rows into files, shard by shard, or finds them there; no more than one shard is in memory.

    Args:
        rows: read only where the files are not there.
        encode: as `in_memory`.
        directory: made whole or not at all.
        name, fingerprint, origin: of the result; the second says that the files are the right ones.

    Raises:
        UserError: the disk is full or refuses, or what is there is damaged.
    """
    disk.made_once(directory, MANIFEST, lambda made: _write(rows, encode, made, fingerprint))
    return replace(_opened(directory, name, fingerprint), origin=origin)


def _write(rows: Iterable[Row], encode: Encode, directory: Path, fingerprint: str) -> None:
    files = []
    for number, shard in enumerate(_shards(rows, encode)):
        stem = f"{number:05d}-{shard.num_tokens}"
        parts = {
            "ids": shard.ids_N,
            "ends": shard.ends_D,
            "documents": shard.documents_D,
            "trained": shard.trained_N,
        }
        for part, array in parts.items():
            if array is not None:
                np.save(directory / f"{stem}.{part}.npy", array)
        files.append({"stem": stem, "tokens": shard.num_tokens, "documents": len(shard)})
    manifest = {"version": VERSION, "fingerprint": fingerprint, "shards": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _opened(directory: Path, name: str, fingerprint: str) -> Tokens:
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if (manifest["version"], manifest["fingerprint"]) != (VERSION, fingerprint):
            raise ValueError("it is of another text, tokenizer or version")
        shards = tuple(
            ShardOnDisk(directory / told["stem"], told["documents"], told["tokens"]) for told in manifest["shards"]
        )
        for shard in shards:
            shard.opened()  # one after the other: all of them would be more files than a process may have open
        return Tokens(name, fingerprint, shards)
    except (ValueError, KeyError, FileNotFoundError, EOFError) as error:
        raise UserError(f"the tokens in {directory} cannot be used: {error}", hint=f"rm -r {directory}") from error


def _shards(rows: Iterable[Row], encode: Encode) -> Iterator[Shard]:
    held: list[Encoded] = []
    hashes: list[int] = []
    count = 0
    following = iter(rows)
    while some := list(islice(following, ROWS_AT_ONCE)):
        for row, document in zip(some, encode(some), strict=True):
            if held and count + len(document.ids) > SHARD_TOKENS:
                yield Shard.of(held, hashes)
                held, hashes, count = [], [], 0
            held.append(document)
            hashes.append(int(row.document, 16))
            count += len(document.ids)
    if held:
        yield Shard.of(held, hashes)


class Documents(Stream):
    """The documents of a corpus, once: as they stand, or, with a seed, shards shuffled and documents within each.

    Only the order within one shard is in memory.

    Attributes:
        number: in the corpus, of the document that came last; -1 before the first.
    """

    def __init__(self, tokens: Tokens, *, seed: int | None = None) -> None:
        self.held, self.seed, self.begins = tokens, seed, tokens.begins
        self.restart(0)

    def counted(self) -> Documents:
        return self

    @property
    def number(self) -> int:
        return int(self.begins[self._among[self.place]] + self._within[self.cursor - 1]) if self.cursor else -1

    def __next__(self) -> Encoded:
        while self.cursor >= len(self._within):
            if self.place + 1 >= len(self._among):
                raise StopIteration
            self._enter(self.place + 1)
        self.cursor += 1
        return self._shard[int(self._within[self.cursor - 1])]

    def own_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place, "cursor": self.cursor}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.restart(state["epoch"])
        self._enter(state["place"])
        self.cursor = state["cursor"]

    def label(self) -> str:
        order = "in order" if self.seed is None else f"shuffled(seed={self.seed})"
        return f"{self.held.name} ({len(self.held):,} documents, {self.held.fingerprint[:8]}) {order}"

    def tokens(self) -> int | None:
        return self.held.num_tokens

    def restart(self, epoch: int) -> None:
        self.epoch = epoch
        self._among = self._order(len(self.held.shards))
        self._enter(0)

    def _enter(self, place: int) -> None:
        self.place, self.cursor = place, 0
        number = int(self._among[place])
        self._shard = self.held.shards[number].opened()
        self._within = self._order(len(self._shard), number)

    def _order(self, count: int, *shard: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(count)
        return np.random.default_rng((self.seed, self.epoch, *shard)).permutation(count)


class Chosen(Stream):
    """Some documents of a corpus in an order of their own, once; another pass may choose others.

    Attributes:
        number: in the corpus, of the document that came last; -1 before the first.
    """

    def __init__(self, tokens: Tokens, places: Callable[[int], np.ndarray], *, name: str) -> None:
        """Puts documents in order; a pass that was begun ends in the order that it began with.

        Args:
            tokens: of the corpus.
            places: pass -> numbers of its documents (D,), each below `len(tokens)`.
            name: of the choice; it is part of what the stream is known by.
        """
        self.held, self.places, self.name = tokens, places, name
        self.begins, self.lengths_D = tokens.begins, tokens.lengths()
        self.opened: dict[int, Shard] = {}
        self.restart(0)

    def counted(self) -> Chosen:
        return self

    @property
    def number(self) -> int:
        return int(self.order[self.cursor - 1]) if self.cursor else -1

    def __next__(self) -> Encoded:
        if self.cursor >= len(self.order):
            raise StopIteration
        self.cursor += 1
        place = int(self.order[self.cursor - 1])
        shard = int(np.searchsorted(self.begins, place, side="right")) - 1
        if shard not in self.opened:
            if len(self.opened) >= OPEN_SHARDS:
                del self.opened[next(iter(self.opened))]  # the one that was opened first
            self.opened[shard] = self.held.shards[shard].opened()
        return self.opened[shard][place - int(self.begins[shard])]

    def own_state(self) -> dict[str, Any]:
        return {"name": self.name, "epoch": self.epoch, "cursor": self.cursor, "order": torch.from_numpy(self.order)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        if state["name"] != self.name:
            raise UserError(f"{self.held.name} was read as {state['name']}, and is now chosen as {self.name}")
        self._begin(state["epoch"], state["order"].numpy())
        self.cursor = state["cursor"]

    def label(self) -> str:
        return f"{self.held.name} ({len(self.held):,} documents, {self.held.fingerprint[:8]}), {self.name}"

    def tokens(self) -> int | None:
        return self.num_tokens

    def restart(self, epoch: int) -> None:
        self._begin(epoch, self.places(epoch))

    def _begin(self, epoch: int, order: np.ndarray) -> None:
        self.epoch, self.cursor, self.order = epoch, 0, np.array(order)
        self.num_tokens = int(self.lengths_D[self.order].sum())


def fingerprint_of(*parts: str) -> str:
    """Hash of what tokens depend on, and of the code that makes them."""
    return hashlib.sha256("\n".join([*parts, str(VERSION), version("overhaul")]).encode()).hexdigest()
