"""`ledger.jsonl`: which documents a model was trained on, by the hash of their text, and how many tokens of each.

It lies beside the weights and is copied to every directory that is made of the model; a run that trains adds to it:

    {"source": "new.jsonl", "path": "/data/new.jsonl", ..., "step": 2, "verb": "extend", "method": "cpt",
     "documents": 2, "tokens": 640}
    ["0798f1ceea91e418",512]
    ["3e23e8160039594a",128]

A line for each document that was read, some 27 bytes, in the order of the hashes; no text is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from overhaul.errors import UserError

FILE = "ledger.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How a corpus was read, so that it can be read again.

    Attributes:
        source: what the corpus is called in the record.
        path: a name, an absolute path, or `-`; empty for text that was made on the way.
        field: the column that holds the text.
        limit: rows that were read at most.
        whole: whether nothing was held out.
        plain: whether questions, conversations and preferences were read as plain documents.
        fingerprint: content hash of its parts.
    """

    source: str
    path: str
    field: str | None = None
    limit: int | None = None
    whole: bool = False
    plain: bool = False
    fingerprint: str = ""


class Seen(NamedTuple):
    """Documents of one corpus that a model was given.

    Attributes:
        origin: of the corpus.
        documents_D: hashes of the documents as they stand in it (`Row.document`), uint64.
        tokens_D: how many tokens of each, those of every pass, int64.
    """

    origin: Origin
    documents_D: np.ndarray
    tokens_D: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one step read of one corpus.

    Attributes:
        seen: the documents, each once, in the order of their hashes.
        step: number of the step in the lineage, from 1.
        verb, method: of the step.
    """

    seen: Seen
    step: int
    verb: str
    method: str

    @property
    def called(self) -> str:
        """The step, for messages."""
        return f"step {self.step}, {self.verb} {self.method}"


def merged(seen: Iterable[Seen]) -> tuple[Seen, ...]:
    """What was read in several parts as one for each corpus, each document once; those not reached are left out."""
    parts: dict[Origin, list[Seen]] = {}
    for one in seen:
        parts.setdefault(one.origin, []).append(one)
    found = []
    for origin, several in parts.items():
        tokens_K = np.concatenate([one.tokens_D for one in several])
        reached_K = np.concatenate([one.documents_D for one in several])[tokens_K > 0]
        documents_D, places_K = np.unique(reached_K, return_inverse=True)
        tokens_D = np.zeros(len(documents_D), np.int64)
        np.add.at(tokens_D, places_K, tokens_K[tokens_K > 0])
        if len(documents_D):
            found.append(Seen(origin, documents_D, tokens_D))
    return tuple(found)


def add(directory: Path, seen: Iterable[Seen], *, step: int, verb: str, method: str, anew: bool = False) -> None:
    """Adds what a step read to the ledger that was copied into a directory, or begins one.

    Args:
        directory: that is being written.
        seen: as `merged`.
        step, verb, method: as `Entry`.
        anew: begin with an empty one: the weights are none of those that read what came before.
    """
    if anew:
        (directory / FILE).unlink(missing_ok=True)
    for one in seen:
        told = asdict(one.origin) | {"step": step, "verb": verb, "method": method}
        told |= {"documents": len(one.documents_D), "tokens": int(one.tokens_D.sum())}
        with (directory / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(told, ensure_ascii=False) + "\n")
            pairs = zip(one.documents_D.tolist(), one.tokens_D.tolist(), strict=True)
            file.writelines(f'["{document:016x}",{tokens}]\n' for document, tokens in pairs)


def read(directory: Path) -> tuple[Entry, ...]:
    """The ledger of a model; empty where it has none.

    Raises:
        UserError: it is damaged.
    """
    if not (directory / FILE).is_file():
        return ()
    try:
        with (directory / FILE).open(encoding="utf-8") as lines:
            return tuple(_entries(lines))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / FILE} cannot be read: {error}", hint="a fresh copy of the model") from error


def _entries(lines: Iterator[str]) -> Iterator[Entry]:
    for line in lines:
        told: Mapping[str, Any] = json.loads(line)
        origin = Origin(**{field.name: told[field.name] for field in fields(Origin)})
        documents_D, tokens_D = np.zeros(told["documents"], np.uint64), np.zeros(told["documents"], np.int64)
        for place in range(told["documents"]):
            document, tokens_D[place] = json.loads(next(lines, "null"))
            documents_D[place] = int(document, 16)
        if tokens_D.sum() != told["tokens"]:
            raise ValueError(f"the tokens of {origin.source} are not {told['tokens']}")
        seen = Seen(origin, documents_D, tokens_D)
        yield Entry(seen=seen, step=told["step"], verb=told["verb"], method=told["method"])


def sources(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The ledger without the documents: `{"source", "documents", "tokens", "step", "verb", "method"}` an entry."""
    return [
        {
            "source": entry.seen.origin.source,
            "documents": len(entry.seen.documents_D),
            "tokens": int(entry.seen.tokens_D.sum()),
            "step": entry.step,
            "verb": entry.verb,
            "method": entry.method,
        }
        for entry in entries
    ]
