"""What a user would write: prune by magnitude and retrain, in one plain script with torch and transformers only.

Arguments: norms|mask_lora MODEL TRAIN_WINDOWS HELDOUT_WINDOWS STEPS BATCH LR.
"""

from __future__ import annotations

import json
import math
import sys
import time

import torch
from torch import nn
from transformers import AutoModelForCausalLM

which, path, train_path, heldout_path = sys.argv[1:5]
steps, batch, lr = int(sys.argv[5]), int(sys.argv[6]), float(sys.argv[7])
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


class MaskLoRA(nn.Module):
    """W_p + M * (2 B A)."""

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, rank: int = 8) -> None:
        super().__init__()
        self.weight, self.mask = weight, mask
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight + self.mask * (2.0 * self.B @ self.A))


@torch.no_grad()
def perplexity(windows_NT: torch.Tensor) -> float:
    """Over windows, in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(input_ids=ids, labels=ids).loss.float() for ids in windows_NT.split(2)]
    return math.exp(torch.stack(losses).mean())


model.requires_grad_(False)
trained = [p for name, p in model.named_parameters() if "norm" in name]
for layer in model.model.layers:
    for parent in (layer.self_attn, layer.mlp):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                score = linear.weight.abs()
                mask = (score > score.flatten().kthvalue(score.numel() // 2).values).float()
                linear.weight.data.mul_(mask)
                if which == "mask_lora":
                    setattr(parent, name, MaskLoRA(linear.weight, mask))
                    trained += list(getattr(parent, name).parameters())[1:]
trained = [p for p in trained if p.requires_grad_(True) is not None]
before = perplexity(torch.load(heldout_path))
optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda i: min((i + 1) / (0.1 * steps), (steps - i) / (0.9 * steps))
)
model.train()
began = time.perf_counter()
for ids_BT in torch.load(train_path)[: steps * batch].split(batch):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
seconds = time.perf_counter() - began
model.eval()
print(json.dumps({"seconds": seconds, "before": before, "after": perplexity(torch.load(heldout_path))}))
