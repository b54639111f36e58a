"""llmcompressor's one-shot pruning, timed; runs in the peers' environment. Arguments: wanda|sparsegpt MODEL WINDOWS OUT."""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from transformers import AutoModelForCausalLM

method, path, windows_path, out = sys.argv[1:]
windows_NT = torch.load(windows_path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in windows_NT]
modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method](
    sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]
)
began = time.perf_counter()
oneshot(
    model=model,
    dataset=Dataset.from_list(rows),
    recipe=modifier,
    num_calibration_samples=len(rows),
    max_seq_length=windows_NT.shape[1],
)
seconds = time.perf_counter() - began
model.to(torch.bfloat16).save_pretrained(out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}))
