"""peft's LoRA r16 on all linear layers in a plain loop, bf16 autocast. Arguments: MODEL WINDOWS(N,T) STEPS BATCH."""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

path, windows_path, steps, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
windows_NT = torch.load(windows_path)
base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
model.train()
seconds = []
for ids_BT in windows_NT[: steps * batch].split(batch):
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - began)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds_per_step": seconds[2:], "peak_rss_bytes": peak}))
