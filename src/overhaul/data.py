"""A corpus as one model sees it: tokens, windows, streams."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from overhaul import tokens
from overhaul.corpora import Corpus, as_plain_text, open_several
from overhaul.documents import Row, row_text
from overhaul.errors import UserError
from overhaul.fetch import cache_directory
from overhaul.lineage import LineageStep
from overhaul.method import Training
from overhaul.on_disk import RowsOnDisk
from overhaul.stream import Batch, Encoded, Map, Pack, Repeat, Rows, Shuffle, Stream, Take, padded
from overhaul.tokens import Chosen, Documents, Tokens

log = logging.getLogger(__name__)
Split = Literal["train", "calib", "heldout"]
IN_MEMORY_BYTES = 4_000_000
"""Of text, whose tokens are kept in memory; those of a larger corpus are written to files and mapped."""


@dataclass(frozen=True)
class Data:
    """A corpus with the tokenizer of the model that will read it.

    Attributes:
        corpus: documents, split into train, calib and heldout.
        tokenizer: a transformers tokenizer.
        seed: orders the documents.
        model: how the user called the model, for tables.
        dtype: of matrix products when something is measured on it.
        dense_tensors: prefix of names -> the weights before pruning, without the prefix, read from the ancestor's
            files; None when the lineage names no dense ancestor that is still there.
        lineage: what was done to the model before.
        beside: further corpora that were opened already, by the names that `on` is given.
    """

    corpus: Corpus
    tokenizer: Any
    seed: int = 0
    model: str = ""
    dtype: torch.dtype = torch.float32
    dense_tensors: Callable[[str], dict[str, Tensor]] | None = None
    lineage: tuple[LineageStep, ...] = ()
    beside: Mapping[str, Corpus] = field(default_factory=dict)

    def on(self, path: str, *, plain: bool = False) -> Data:
        """The same with another corpus; asked for again, the same object, so that nothing is encoded twice.

        Args:
            path: a named corpus, a file or a directory.
            plain: with questions and answers, conversations and preferences as plain documents.

        Raises:
            UserError: there is no such corpus.
        """
        if (path, plain) not in self._on:
            others = (data.corpus.name for (other, _), data in self._on.items() if other != path)
            corpus = self.beside.get(path) or open_several([path], taken=[self.corpus.name, *others])[path]
            self._on[path, plain] = replace(self, corpus=as_plain_text(corpus) if plain else corpus)
        return self._on[path, plain]

    @cached_property
    def _on(self) -> dict[tuple[str, bool], Data]:
        return {}

    def encode(self, row: Row) -> Encoded:
        """One document as tokens, closed by the end-of-sequence token, which is trained on.

        It is opened as the tokenizer opens every text (Llama, Gemma), unless a chat template does that.
        """
        return self.encoded([row])[0]

    def encoded(self, rows: Sequence[Row]) -> list[Encoded]:
        """As `encode`, of many documents in one call of the tokenizer."""
        segments = [self.segments(row) for row in rows]
        texts = [text for pieces in segments for text, _ in pieces]
        pieces = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        documents = []
        for row, told in zip(rows, segments, strict=True):
            opening = [] if self._is_chat(row) else self.opening
            parts = [(opening, False), *((next(pieces), is_trained) for _, is_trained in told), (end, True)]
            ids = [token for part, _ in parts for token in part]
            trained = np.repeat([is_trained for _, is_trained in parts], [len(part) for part, _ in parts])
            documents.append(Encoded(np.array(ids, np.int64), trained))
        return documents

    def segments(self, row: Row) -> list[tuple[str, bool]]:
        """The row's text in pieces, each with whether it is trained on.

        A conversation is rendered turn by turn by the model's own chat template.

        Raises:
            UserError: the template refuses the conversation, or changes what it wrote of a turn when another one
                follows.
        """
        if not self._is_chat(row):
            return row_text(row)
        turns = [{"role": message.role, "content": message.content} for message in row["messages"]]
        pieces, before = [], ""
        for count, turn in enumerate(turns, 1):
            after = self._rendered(turns[:count])
            if not after.startswith(before):
                raise UserError(
                    f"the chat template of {self.model or 'this model'} writes earlier turns anew when one is added",
                    allowed="conversations of one question and one answer, or prompt and completion columns",
                )
            said = after[len(before) :]
            is_answer = turn["role"] == "assistant"
            opening = self._header(turns[: count - 1], before, after) if is_answer and count > 1 else 0
            # The model is trained on what the assistant says and on how its turn ends, not on the role's header.
            pieces += [(said[:opening], False), (said[opening:], is_answer)]
            before = after
        return [(text, is_trained) for text, is_trained in pieces if text]

    def _header(self, turns: list[dict[str, str]], before: str, after: str) -> int:
        """Characters between `before` and what the assistant says; 0 where the template has no opening of its own."""
        opened = self._rendered(turns, add_generation_prompt=True)
        return len(opened) - len(before) if after.startswith(opened) else 0

    def _rendered(self, turns: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        """The turns in the model's chat template; `UserError` with its message where it refuses them."""
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self.model or 'this model'} refuses turns of "
                f"{', '.join(turn['role'] for turn in turns)}: {error}",
                allowed="conversations whose roles, and their order, the template knows",
            ) from error

    def _is_chat(self, row: Row) -> bool:
        return "messages" in row and bool(self.tokenizer.chat_template)

    @cached_property
    def opening(self) -> list[int]:
        """The beginning-of-sequence token where the tokenizer adds one by itself."""
        added = self.tokenizer("", verbose=False)["input_ids"]
        return added[:1] if added[:1] == [self.tokenizer.bos_token_id] else []

    @cached_property
    def _reader(self) -> str:
        """All that decides which tokens a text becomes, hashed."""
        return _hash(_told(self.tokenizer))

    @cached_property
    def _train(self) -> Tokens:
        """The training documents as tokens."""
        name = f"{self.corpus.name}/train"
        key = tokens.fingerprint_of(self.corpus.fingerprint, name, self._reader)
        how: dict[str, Any] = {"name": name, "fingerprint": key, "origin": self.corpus.origin}
        if self.corpus.bytes <= IN_MEMORY_BYTES:
            return tokens.in_memory(self.corpus.train, self.encoded, **how)
        return tokens.on_disk(self.corpus.train, self.encoded, cache_directory() / "tokens" / key[:32], **how)

    def documents(self, *splits: Split) -> Rows:
        """The documents of some splits as the source of a stream; of a training text on disk its first rows."""
        parts = [getattr(self.corpus, split) for split in splits]
        items = [row for part in parts for row in (part.at_hand() if isinstance(part, RowsOnDisk) else part)]
        name = f"{self.corpus.name}/{'+'.join(splits)}"
        return Rows(items, name=name, fingerprint=_hash(self.corpus.fingerprint, name))

    def packed(self, *splits: Split, seq_len: int) -> Pack:
        """The documents of some splits, in order, once, as windows."""
        return Pack(Map(self.documents(*splits), self.encode, name="encode"), seq_len=seq_len)

    def windows(self, split: Split, *, seq_len: int, limit: int | None = None, flag: str = "--seq-len") -> Tensor:
        """The split's text cut into non-overlapping windows.

        Args:
            split: train, calib or heldout.
            seq_len: tokens per window.
            limit: windows at most.
            flag: what to type for a shorter window.

        Returns:
            `(N, seq_len)` int64, the first `limit` windows.

        Raises:
            UserError: the text is shorter than one window.
        """
        stream: Stream = self.packed(split, seq_len=seq_len)
        found = [window["input_ids"] for window in (stream if limit is None else Take(stream, limit))]
        if not found:
            raise self._too_short((split,), seq_len, flag)
        return torch.stack(found)

    def training(self, settings: Training) -> Stream:
        """Shuffled training documents without end, packed and batched."""
        return Batch(self.endless(seq_len=settings.seq_len), batch_size=settings.batch_size)

    def endless(self, *, seq_len: int, in_order: bool = False, document_mask: bool = False) -> Stream:
        """Training documents without end, as windows.

        Args:
            seq_len: tokens per window.
            in_order: as they stand in the corpus, instead of shuffled anew in each pass.
            document_mask: windows tell where documents begin, see `Pack`.

        Raises:
            UserError: the text is shorter than one window.
        """
        if self._train.num_tokens < seq_len:
            raise self._too_short(("train",), seq_len)
        documents = Repeat(Documents(self._train, seed=None if in_order else self.seed))
        return Pack(documents, seq_len=seq_len, document_mask=document_mask)

    def chosen(
        self, places: Callable[[int], np.ndarray], *, name: str, seq_len: int, document_mask: bool = False
    ) -> Stream:
        """Some training documents in an order of their own, without end, as windows.

        Args:
            places: pass -> numbers of its documents, in order.
            name: of the choice.
            seq_len, document_mask: as `endless`.
        """
        documents = Repeat(Chosen(self._train, places, name=name))
        return Pack(documents, seq_len=seq_len, document_mask=document_mask)

    def lengths(self) -> np.ndarray:
        """Tokens of each training document (D,)."""
        return self._train.lengths()

    def examples(self, settings: Training) -> Stream:
        """Shuffled training documents without end, each alone in a window, so that none is read after another.

        Documents longer than `settings.seq_len` are left out, with a warning.

        Raises:
            UserError: all of them are.
        """
        train = list(self.corpus.train)
        lengths = [len(document.ids) for document in self.encoded(train)]
        kept = [row for row, length in zip(train, lengths, strict=True) if length <= settings.seq_len]
        if not kept:
            raise UserError(
                f"every row of {self.corpus.name} is longer than --seq-len {settings.seq_len}",
                hint=f"--seq-len {min(lengths)}",
            )
        if len(kept) < len(lengths):
            log.warning("%d rows are longer than %d tokens: left out", len(lengths) - len(kept), settings.seq_len)
        width = max(length for length in lengths if length <= settings.seq_len)
        rows = Rows(kept, name=self.corpus.name, fingerprint=self.corpus.fingerprint)
        encoded = Map(Repeat(Shuffle(rows, seed=self.seed)), self.encode, name="encode")
        return Batch(Map(encoded, lambda row: padded(row, width), name=f"pad({width})"), batch_size=settings.batch_size)

    def place(self, *, seq_len: int, in_order: bool = False, document_mask: bool = False) -> str:
        """What a place in `endless` is known by: the same text, read by the same tokenizer in the same order.

        Windows with and without a document mask have different labels, so what is left of one is none of the other.
        """
        order = "in order" if in_order else f"seed {self.seed}"
        masked = ("document mask",) if document_mask else ()
        return _hash(self.corpus.fingerprint, self._reader, str(seq_len), order, *masked)

    def calibration(self, *, samples: int, seq_len: int, batch_size: int = 1) -> Stream:
        """`samples` windows for statistics, from the calibration and training text, in a seeded order.

        Fewer are used, with a warning, where the text is shorter than that.
        """
        documents = Shuffle(self.documents("calib", "train"), seed=self.seed)
        packed = Pack(Map(documents, self.encode, name="encode"), seq_len=seq_len)
        windows = list(Take(packed, samples))
        if not windows:
            raise self._too_short(("calib", "train"), seq_len)
        if len(windows) < samples:
            log.warning("%s holds %d calibration windows of %d tokens; %d were asked for",
                        self.corpus.name, len(windows), seq_len, samples)  # fmt: skip
        name = f"{self.corpus.name}/calibration(seed={self.seed})"
        rows = Rows(
            windows,
            name=name,
            fingerprint=_hash(self.corpus.fingerprint, name),
            tokens=len(windows) * seq_len,
        )
        return Batch(rows, batch_size=math.gcd(len(windows), batch_size))

    @property
    def num_training_tokens(self) -> int:
        """Tokens of one pass over the training documents."""
        return self._train.num_tokens

    def unread_share(self) -> float:
        """Share of the training tokens, of the first shard, that are unknown words or bytes of words spelled out.

        Bytes of ASCII do not count: line breaks and tabs are such tokens in the vocabularies of Llama 2 and its like.
        """
        vocabulary = self.tokenizer.get_vocab()
        odd = [vocabulary[f"<0x{byte:02X}>"] for byte in range(128, 256) if f"<0x{byte:02X}>" in vocabulary]
        # Where an end-of-text token stands for unknown words, all documents have one.
        if self.tokenizer.unk_token_id not in (None, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            odd.append(self.tokenizer.unk_token_id)
        if not odd or not self._train.shards:
            return 0.0
        return float(np.isin(self._train.shards[0].opened().ids_N, odd).mean())

    def steps_for(self, settings: Training, *, processes: int = 1) -> Training:
        """Turns `epochs` into `steps`."""
        if settings.epochs is None:
            return settings
        a_step = settings.batch_size * settings.accumulate * settings.seq_len * processes * settings.new_share()
        return settings.model_copy(
            update={"steps": max(1, math.ceil(settings.epochs * self.num_training_tokens / a_step))}
        )

    def _too_short(self, splits: tuple[Split, ...], seq_len: int, flag: str = "--seq-len") -> UserError:
        held = sum(len(document.ids) for document in self.encoded(self.documents(*splits).items))
        return UserError(
            f"corpus {self.corpus.name!r}: its {'+'.join(splits)} text has {held} tokens, a window has {seq_len}",
            allowed=f"{flag} up to {held}, or more text",
            hint=f"{flag} {max(2 ** int(math.log2(max(held, 2))), 2)}",
        )


def _told(tokenizer: Any) -> str:
    """All that decides which tokens a text becomes."""
    whole = getattr(tokenizer, "backend_tokenizer", None)
    # How a batch was last cut or filled up is kept with a fast tokenizer, and no matter here.
    inner = {**json.loads(whole.to_str()), "truncation": None, "padding": None} if whole else tokenizer.get_vocab()
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)
    return json.dumps([type(tokenizer).__name__, inner, ends], sort_keys=True)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
