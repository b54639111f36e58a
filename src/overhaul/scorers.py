"""How hard documents are for a model: what a curriculum orders them by, or a selection keeps.

Letters of shapes: D documents, B documents of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import nn

from overhaul import machine
from overhaul.data import Data
from overhaul.documents import Row
from overhaul.errors import UserError
from overhaul.evaluate import document_nll
from overhaul.generation import longest
from overhaul.on_disk import RowsOnDisk
from overhaul.progress import Bar
from overhaul.stream import Encoded

FEWEST = 2
"""Scored tokens below which a document has no loss to speak of."""

_AT_ONCE = 1024


def document_losses(
    model: nn.Module,
    data: Data,
    rows: Sequence[Row] | RowsOnDisk,
    *,
    max_tokens: int,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    title: str = "",
) -> np.ndarray:
    """Mean negative log-likelihood of the beginning of each document, alone in its window.

    L_d = - 1/K sum over k of log p(token_k | those before it), over the K tokens of the first `max_tokens` that are
    trained on, without the first token. exp(L_d) is the document's perplexity (Chen et al., 2024, order a new
    language by the base model's).

    Args:
        model: a causal language model.
        data: whose tokenizer reads the documents.
        rows: the documents.
        max_tokens: of each document; the rest is not read.
        dtype: of matrix products.
        batch_size: documents per pass.
        title: of the progress bar; there is none without a title.

    Returns:
        `(D,)` nats a token, fp64; infinite with fewer than `FEWEST` scored tokens, so that those come last.

    Raises:
        UserError: `max_tokens` leaves nothing to score or is more than the model reads, or a loss is not finite.
    """
    if not FEWEST < max_tokens <= longest(model):
        raise UserError(
            f"documents of up to {max_tokens} tokens for a model that reads {longest(model)}",
            allowed=f"{FEWEST + 1} to {longest(model)} tokens",
        )
    model.eval()
    losses_D = np.full(len(rows), np.inf)
    with machine.autocast(next(model.parameters()).device, dtype), Bar(title, len(rows), quiet=not title) as bar:
        for places, documents in _batches(data, rows, max_tokens, batch_size):
            losses_B = document_nll(model, documents)
            if not np.isfinite(losses_B).all():
                bad = int(np.isfinite(losses_B).argmin())
                raise UserError(
                    f"the loss of document {places[bad] + 1} of {data.corpus.name} is {losses_B[bad]}",
                    allowed="a model whose losses are finite",
                )
            losses_D[places] = losses_B
            for _ in places:
                bar.step()
    return losses_D


def _batches(
    data: Data, rows: Sequence[Row] | RowsOnDisk, max_tokens: int, batch_size: int
) -> Iterator[tuple[list[int], list[Encoded]]]:
    """Beginnings of documents that have a loss, with their places: of like length in a batch, the longest first."""
    rest, first = iter(rows), 0
    while some := list(islice(rest, _AT_ONCE)):
        begun = [Encoded(ids[:max_tokens], trained[:max_tokens]) for ids, trained in data.encoded(some)]
        kept = [place for place, document in enumerate(begun) if document.trained[1:].sum() >= FEWEST]
        kept.sort(key=lambda place: -len(begun[place].ids))
        for start in range(0, len(kept), batch_size):
            batch = kept[start : start + batch_size]
            yield [first + place for place in batch], [begun[place] for place in batch]
        first += len(some)
