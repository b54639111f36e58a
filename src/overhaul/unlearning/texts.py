"""Texts to forget as windows that are all of them, each with one to retain beside it.

Letters of shapes: N windows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overhaul import machine
from overhaul.data import Data
from overhaul.errors import UserError
from overhaul.objective import Forward
from overhaul.stream import IGNORED, Batch, Repeat, Rows, Shuffle, Stream, named
from overhaul.unlearning.terms import REFERENCE, RETAINED, log_probabilities

Windows = dict[str, Tensor]
"""`input_ids` and `labels`, `(N, T)` int64; with a reference `(N,)` float32 too."""


def cut(whole: Data, seq_len: int, *, once: bool = False) -> Windows:
    """Every token of a corpus of which nothing is held out; the last window is filled up from the first's beginning.

    Args:
        whole: the corpus.
        seq_len: T.
        once: of what fills up nothing is a label, so that every token counts once.

    Raises:
        UserError: nothing of it is a label.
    """
    documents = whole.encoded(list(whole.corpus.train))
    ids_K = np.concatenate([document.ids for document in documents])
    labels_K = np.where(np.concatenate([document.trained for document in documents]), ids_K, IGNORED)
    if not (labels_K != IGNORED).any():
        raise UserError(f"{whole.corpus.source} has nothing that could be unlearnt or retained: no answer, no text")
    places_NT = np.arange(-(-len(ids_K) // seq_len) * seq_len).reshape(-1, seq_len)
    ids_NT, labels_NT = (values_K[places_NT % len(ids_K)] for values_K in (ids_K, labels_K))
    if once:
        labels_NT[places_NT >= len(ids_K)] = IGNORED
    return {"input_ids": torch.from_numpy(ids_NT), "labels": torch.from_numpy(labels_NT)}


def hashed(found: Windows) -> str:
    """Hash of all tokens and labels."""
    digest = hashlib.sha256()
    for tensor in (found["input_ids"], found["labels"]):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def with_reference(model: nn.Module, found: Windows, *, batch_size: int, dtype: torch.dtype) -> Windows:
    """The windows with each one's log-probability under the model as it is, in nats."""
    device, sums = next(model.parameters()).device, []
    was_training = model.training
    model.eval()
    with machine.autocast(device, dtype):
        for at in range(0, len(found["labels"]), batch_size):
            batch = {name: tensor[at : at + batch_size].to(device) for name, tensor in found.items()}
            sums.append(log_probabilities(Forward(model, batch), batch).float().cpu())
    model.train(was_training)
    return {**found, REFERENCE: torch.cat(sums)}


def endless(found: Windows, *, name: str, seed: int, batch_size: int) -> Stream:
    """Batches of some windows in an order that is drawn anew in every pass.

    Args:
        found: the windows.
        name: of the corpus.
        seed: of the order.
        batch_size: windows of a batch.
    """
    rows = [{key: tensor[number] for key, tensor in found.items()} for number in range(len(found["labels"]))]
    source = Rows(rows, name=name, fingerprint=hashed(found), tokens=found["labels"].numel())
    return Batch(Repeat(Shuffle(source, seed=seed)), batch_size=batch_size)


class Beside(Stream):
    """Batches of one stream, each with one of another under names that begin with `retain/`."""

    def __init__(self, source: Stream, other: Stream) -> None:
        self.sources = (source, other)

    def __next__(self) -> dict[str, Tensor]:
        own, other = (next(source) for source in self.sources)
        return {**own, **named(RETAINED, other)}

    def own_state(self) -> dict[str, Any]:
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        pass

    def label(self) -> str:
        return "beside"

    def tokens(self) -> int | None:
        return self.sources[0].tokens()
