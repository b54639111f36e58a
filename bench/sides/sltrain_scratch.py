"""Training the paper's 60M model from scratch, as factors by our library or dense, one optimizer step a turn."""

from typing import Any

import torch
import turn
from transformers import AutoModelForCausalLM, LlamaConfig

from overhaul import factored, machine
from overhaul.optim.adamw import adamw

given = turn.settings()
config = LlamaConfig(**given["config"])
ids_BT = torch.arange(given["batch_size"] * given["seq_len"]).view(given["batch_size"], -1) % config.vocab_size

turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing made

turn.wait()
machine.seed_everything(0)
model: Any = (
    factored.from_config(config, **given["form"])
    if given["form"]
    else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
)
optimizer = adamw(model.parameters(), lr=1e-3)
turn.tell(parameters=sum(p.numel() for p in model.parameters()))

while True:
    turn.wait()
    # None of them is freed: after the first step all are there at once, as in every later one.
    optimizer.zero_grad(set_to_none=False)
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    optimizer.step()
    state = [value for held in optimizer.state.values() for value in held.values()]
    weights = [*model.parameters(), *model.buffers()]
    turn.tell(
        weights=sum(tensor.nbytes for tensor in weights),
        gradients=sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        optimizer=sum(tensor.nbytes for tensor in state),
    )
