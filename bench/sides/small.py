"""A model of the same family with two narrow blocks, on which a side rehearses what will be timed.

All code and kernels that are loaded at first use are there then, on both sides. Needs transformers alone, as `turn`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@contextmanager
def small_copy(model: str) -> Iterator[Path]:
    """A directory with the small model and the tokenizer of `model`."""
    config = AutoConfig.from_pretrained(
        model, num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    config.head_dim = 16
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
        for file in Path(model).glob("tokenizer*"):
            shutil.copy(file, directory)
        yield Path(directory)
