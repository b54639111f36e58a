"""`overhaul adapt full|lora|randlora|hft` by its library, one optimizer step a turn."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import turn

from overhaul import artifact, machine
from overhaul.adapt.full import Full
from overhaul.adapt.hft import HalfFineTuning
from overhaul.adapt.lora import LoRA
from overhaul.adapt.randlora import RandLoRA
from overhaul.stream import Batch, Repeat, Rows
from overhaul.train import train
from overhaul.watch import Watcher


class Turns(Watcher):
    """Ends a turn after each step, and tells what optimizer and gradients hold."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def start(self, model: torch.nn.Module) -> None:
        turn.wait()

    def step(self, model: torch.nn.Module, step: int) -> None:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        turn.tell(state_bytes=sum(value.nbytes for value in [*states, *gradients] if isinstance(value, torch.Tensor)))
        turn.wait()


given = turn.settings()
dtype = getattr(torch, given["compute_dtype"])
settings: dict[str, Any] = {key: given[key] for key in ("steps", "batch_size", "seq_len", "lr")} | {"save_every": 0}
if "optimizer" in given:
    settings |= {"optimizer": given["optimizer"], "projection": {"rank": given["rank"], "gap": given["gap"]}}
method = {
    "full": Full(**settings),
    "lora": LoRA(**settings, rank=16, alpha=32),
    "randlora": RandLoRA(**settings, rank=32, alpha=640),
    "hft": HalfFineTuning(**settings),
    "hft-blocks": HalfFineTuning(**settings, freeze_embeddings=True),
}[given["method"]]

turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
made = artifact.load(given["model"], dtype=machine.weights_dtype(dtype))  # as the command line has it
turn.tell()

machine.seed_everything(0)
windows = [{"input_ids": ids_T, "labels": ids_T} for ids_T in torch.from_numpy(np.load(given["windows"]))]
rows = Repeat(Rows(windows, name="bench", fingerprint="bench"))
source = Batch(rows, batch_size=method.batch_size)
data: Any = SimpleNamespace(training=lambda _: source, seed=0, lineage=())
plan = method.plan(made.model, data)
plan = replace(plan, watchers=(*plan.watchers, Turns(plan.optimizer)))
train(plan, method, dtype=dtype, quiet=True)
