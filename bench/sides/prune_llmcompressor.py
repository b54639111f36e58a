"""Wanda and SparseGPT as llmcompressor's documentation has them: load, `oneshot`, save."""

import gc
from typing import Any

import numpy as np
import torch
import turn
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from small import small_copy
from transformers import AutoModelForCausalLM, AutoTokenizer

given = turn.settings()
ids = np.load(given["windows"]).tolist()
modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[given["method"]]


def prune(model: Any, tokenizer: Any, windows: list[list[int]]) -> None:
    masks = [[1] * len(row) for row in windows]
    recipe = modifier(sparsity=given["sparsity"], mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": masks}),
        recipe=recipe,
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )


with small_copy(given["model"]) as small:
    tokenizer = AutoTokenizer.from_pretrained(small)
    prune(AutoModelForCausalLM.from_pretrained(small), tokenizer, [row[:16] for row in ids[:4]])
gc.collect()
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported and was used once, nothing is loaded

turn.wait()
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"]))
tokenizer = AutoTokenizer.from_pretrained(given["model"])
turn.tell(model_bytes=sum(p.nbytes for p in model.parameters()))

turn.wait()
turn.forget_peak()
prune(model, tokenizer, ids)
turn.tell()

turn.wait()
model.to(torch.bfloat16).save_pretrained(given["out"], save_compressed=False)
tokenizer.save_pretrained(given["out"])
turn.tell()
turn.wait()
