"""Small Llamas trained from random weights: four layers, a vocabulary of 512, passages of Wikipedia."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from overhaul import artifact, evaluate
from overhaul.corpora import Corpus, CorpusSpec, open_corpus
from overhaul.data import Data

CORPUS = "boolq-passages"
HIDDEN, FFN, LAYERS = 128, 352, 4
SEQ_LEN, HELDOUT_WINDOWS = 128, 64
MODEL = f"llama {LAYERS} x {HIDDEN}, FFN {FFN}, 512 tokens"


@dataclass(frozen=True, slots=True)
class FromScratch:
    """The text as the small models see it, and how they are judged."""

    corpus: Corpus
    tokenizer: Any

    @classmethod
    def of(cls, tiny: Path) -> Self:
        """With the tokenizer of the tests' model."""
        return cls(open_corpus(CorpusSpec(path=CORPUS)), artifact.load(tiny).processor)

    def data(self, seed: int) -> Data:
        """The corpus, its documents in the seed's order."""
        return Data(self.corpus, self.tokenizer, seed)

    def heldout(self) -> Tensor:
        """Held-out windows (N, T)."""
        return self.data(0).windows("heldout", seq_len=SEQ_LEN, limit=HELDOUT_WINDOWS)

    def loss(self, model: nn.Module) -> float:
        """Held-out loss in nats a token."""
        return math.log(evaluate.perplexity(model, self.heldout(), batch_size=16).estimate.value)

    @property
    def config(self) -> LlamaConfig:
        """Of the small models."""
        return LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=4,
            vocab_size=len(self.tokenizer), max_position_embeddings=512,
        )  # fmt: skip

    def dense(self, seed: int) -> nn.Module:
        """An untrained model."""
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
