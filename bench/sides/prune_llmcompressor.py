"""Wanda and SparseGPT as llmcompressor's documentation has them: load, `oneshot`, save."""

import numpy as np
import torch
import turn
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

given = turn.settings()
ids = np.load(given["windows"]).tolist()
dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[given["method"]]
recipe = modifier(sparsity=given["sparsity"], mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])

turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"]))
tokenizer = AutoTokenizer.from_pretrained(given["model"])
turn.tell(model_bytes=sum(p.nbytes for p in model.parameters()))

turn.wait()
turn.forget_peak()
oneshot(
    model=model,
    processor=tokenizer,
    dataset=dataset,
    recipe=recipe,
    max_seq_length=len(ids[0]),
    num_calibration_samples=len(ids),
    shuffle_calibration_samples=False,
)
turn.tell()

turn.wait()
model.to(torch.bfloat16).save_pretrained(given["out"], save_compressed=False)
tokenizer.save_pretrained(given["out"])
turn.tell()
turn.wait()
