"""Full fine-tuning in a plain loop with the `fira` package's optimizer, one optimizer step a turn."""

import numpy as np
import torch
import turn
from fira import FiraAdamW, divide_params
from transformers import AutoModelForCausalLM

given = turn.settings()
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
turn.tell()

torch.manual_seed(0)
model.train()
groups = divide_params(
    model, target_modules_list=["attn", "mlp"], rank=given["rank"], update_proj_gap=given["gap"], alpha=1.0
)
optimizer = FiraAdamW(groups, lr=given["lr"])
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
