"""Texts as a classifier reads them: tokens of one width, what is padding, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from overhaul.errors import UserError
from overhaul.labelled_texts import LabelledTexts
from overhaul.task_data import ShuffledBatches, encoded

TEXTS = ("a cat", "a cat and a dog and a ship and a tree", "tree")


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    found = AutoTokenizer.from_pretrained(tiny)
    found.pad_token = found.eos_token
    return found


def labelled(texts: tuple[str, ...] = TEXTS) -> LabelledTexts:
    return LabelledTexts(texts=texts, labels_N=np.arange(len(texts)))


def test_tokens_are_the_tokenizers_and_the_rest_is_padding(tokenizer: Any):
    found = encoded(labelled(), tokenizer, 12)

    for row, text in enumerate(TEXTS):
        own = tokenizer(text)["input_ids"][:12]
        assert found.ids_NT[row, : len(own)].tolist() == own
        assert set(found.ids_NT[row, len(own) :].tolist()) <= {tokenizer.pad_token_id}
        assert found.mask_NT[row].tolist() == [1] * len(own) + [0] * (12 - len(own))


def test_padding_at_the_end_of_a_text_is_no_token_of_it(tokenizer: Any):
    plain, ended = (encoded(labelled((text,)), tokenizer, 12) for text in ("a cat", f"a cat{tokenizer.eos_token}"))

    assert plain.ids_NT.tolist() == ended.ids_NT.tolist()
    assert plain.mask_NT.tolist() == ended.mask_NT.tolist()
    with pytest.raises(UserError, match="no token that is no padding"):
        encoded(labelled((tokenizer.eos_token,)), tokenizer, 12)


def test_a_pass_has_every_text_once_and_in_order_is_in_order(tokenizer: Any):
    found = encoded(labelled(TEXTS * 25), tokenizer, 8)
    stream = ShuffledBatches(found, batch_size=10, seed=0, name="t", fingerprint="f" * 16)
    batches = [next(stream) for _ in range(8)]

    assert {name: tensor.dtype for name, tensor in batches[0].items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == list(range(75))
    assert torch.cat([batch["labels"] for batch in found.in_order()]).tolist() == list(range(75))
    some = np.array([40, 3, 7])
    assert torch.cat([batch["labels"] for batch in found.in_order(some)]).tolist() == [40, 3, 7]
