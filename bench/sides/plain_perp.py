"""PERP the way one would write it oneself with transformers and torch: the peer of `overhaul adapt perp`.

Half of each linear layer's weights are zeroed by magnitude, then norms, and with `mask_lora` low-rank increments
under the mask, are trained by AdamW, under bf16 autocast where bf16 is fast. A few optimizer steps a turn.
"""

import numpy as np
import torch
import turn
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer


class MaskLoRA(nn.Module):
    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.mask, self.scale = weight, mask, alpha / rank
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def merged(self) -> torch.Tensor:
        return self.weight + self.mask * (self.B @ self.A) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.merged())


given = turn.settings()
turn.wait()
torch.manual_seed(given["seed"])
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["compute_dtype"]))
model.requires_grad_(False)
for name, layer in list(model.model.layers.named_modules()):
    if isinstance(layer, nn.Linear):
        mask = torch.ones_like(layer.weight, dtype=torch.bool)
        mask.view(-1)[layer.weight.abs().flatten().argsort(stable=True)[: mask.numel() // 2]] = False
        layer.weight.mul_(mask)
        if "mask_lora" in given["train"]:
            parent, _, child = name.rpartition(".")
            adapted = MaskLoRA(layer.weight, mask, given["rank"], given["alpha"])
            setattr(model.model.layers.get_submodule(parent), child, adapted)
for name, parameter in model.named_parameters():
    if "norm" in name or name.endswith((".A", ".B")):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
turn.tell()

model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=given["lr"], weight_decay=0.0)
warmup, steps = given["steps"] // 10, given["steps"]
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)
)
windows_NT = torch.from_numpy(np.load(given["windows"]))
turn.wait()
for step, ids_BT in enumerate(windows_NT.split(given["batch_size"])[:steps], 1):
    with torch.autocast("cpu", torch.bfloat16, enabled=given["compute_dtype"] == "bfloat16"):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % given["steps_a_turn"] == 0:
        turn.tell(loss=loss.item())
        turn.wait()

for name, layer in list(model.model.layers.named_modules()):
    if isinstance(layer, MaskLoRA):
        linear = nn.Linear(*layer.weight.shape[::-1], bias=False)
        linear.weight.data = layer.merged().detach()
        parent, _, child = name.rpartition(".")
        setattr(model.model.layers.get_submodule(parent), child, linear)
model.to(torch.bfloat16).save_pretrained(given["out"])
AutoTokenizer.from_pretrained(given["model"]).save_pretrained(given["out"])
turn.tell()
turn.wait()
