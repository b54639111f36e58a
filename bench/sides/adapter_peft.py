"""LoRA or RandLoRA with peft in a plain loop, under bf16 autocast where bf16 is fast, one optimizer step a turn."""

import numpy as np
import torch
import turn
from peft import LoraConfig, RandLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

given = turn.settings()
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["base_dtype"]))
turn.tell()

torch.manual_seed(0)
config = {
    "lora": LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
    "randlora": RandLoraConfig(r=32, randlora_alpha=640, target_modules="all-linear"),
}[given["method"]]
model = get_peft_model(model, config)
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=given["lr"], weight_decay=0.0)
windows_NT = torch.from_numpy(np.load(given["windows"]))
for step in range(given["steps"]):
    turn.wait()
    first = step * given["batch_size"] % len(windows_NT)
    ids_BT = windows_NT[first : first + given["batch_size"]]
    with torch.autocast("cpu", torch.bfloat16, enabled=given["compute_dtype"] == "bfloat16"):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    turn.tell(loss=float(loss))
turn.wait()
