"""Quantized by bitsandbytes through transformers, as its documentation has it: load, score, save."""

import math

import numpy as np
import torch
import turn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

given = turn.settings()
windows_NT = torch.from_numpy(np.load(given["windows"]))
dtype = getattr(torch, given["dtype"])
config = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}[given["kind"]]

turn.wait()
# What is not quantized, the embedding above all, stays in bf16 on disk as it was.
model = AutoModelForCausalLM.from_pretrained(given["model"], quantization_config=config, dtype=torch.bfloat16)
model.save_pretrained(given["out"])
del model
scored = AutoModelForCausalLM.from_pretrained(given["out"], dtype=dtype).eval()
total, count = 0.0, 0
with torch.no_grad():
    for ids_T in windows_NT:
        logits_TV = scored(ids_T[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="sum"))
        count += len(ids_T) - 1
turn.tell(perplexity=math.exp(total / count))
turn.wait()
