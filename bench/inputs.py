"""What both sides of a bench are given: the same model directory and the same windows of tokens, as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from overhaul import artifact, evaluate, machine, pretrained
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.stream import Take

CORPUS = "boolq-passages"
HELDOUT_WINDOWS = 16


def compute_dtype() -> str:
    """The type of matrix products that is fast on this machine, for both sides: `bfloat16` or `float32`."""
    return str(machine.compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")


def in_words(dtype: str) -> str:
    """How a peer's name says in what type it multiplies."""
    return "bf16 autocast" if dtype == "bfloat16" else "fp32"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Files to work on.

    Attributes:
        model: directory of the default model.
        work: where sides may write.
        data: the corpus as this model sees it.
    """

    model: Path
    work: Path
    data: Data

    @classmethod
    def of(cls, work: Path) -> Inputs:
        """The default model, fetched when it is not there, and the bench's corpus."""
        model = pretrained.resolve(pretrained.DEFAULT)
        tokenizer = artifact.load(model).processor
        return cls(model, work, Data(open_corpus(CorpusSpec(path=CORPUS)), tokenizer))

    def train_windows(self, count: int, seq_len: int) -> Path:
        """A file with `(count, seq_len)` training tokens, int64."""
        return self._saved("train", self.data.windows("train", seq_len=seq_len, limit=count))

    def calibration_windows(self, count: int, seq_len: int) -> Path:
        """A file with `(count, seq_len)` calibration tokens, int64, in the order that `overhaul prune` draws them."""
        batches = Take(self.data.calibration(samples=count, seq_len=seq_len), count)
        return self._saved("calib", torch.cat([batch["input_ids"] for batch in batches]))

    def perplexity(self, directory: Path) -> float:
        """Held-out perplexity of a directory that either side wrote, by the same code, in fp32."""
        windows_NT = self.data.windows("heldout", seq_len=512, limit=HELDOUT_WINDOWS)
        model = artifact.load(directory, dtype=torch.float32).model
        return evaluate.perplexity(model, windows_NT).estimate.value

    def _saved(self, name: str, windows_NT: Tensor) -> Path:
        path = self.work / f"{name}-{'x'.join(map(str, windows_NT.shape))}.npy"
        np.save(path, windows_NT.numpy())
        return path
