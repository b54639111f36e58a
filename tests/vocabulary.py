"""Tokenizers for small models, learnt here in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def byte_level_bpe(texts: Iterable[str], size: int, special: list[str]) -> Any:
    """A `tokenizers.Tokenizer`: byte-level BPE of so many tokens, the special ones among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe
