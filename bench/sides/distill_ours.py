"""`overhaul distill kd` by its library, one optimizer step a turn."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import turn

from overhaul import artifact, machine
from overhaul.distill.kd import KnowledgeDistillation
from overhaul.stream import Batch, Repeat, Rows
from overhaul.train import train
from overhaul.watch import Watcher


class Turns(Watcher):
    """Ends a turn after each step."""

    def start(self, model: torch.nn.Module) -> None:
        turn.tell()  # both models are loaded
        turn.wait()

    def step(self, model: torch.nn.Module, step: int) -> None:
        turn.tell()
        turn.wait()


given = turn.settings()
dtype = getattr(torch, given["dtype"])
settings: dict[str, Any] = {key: given[key] for key in ("teacher", "steps", "batch_size", "seq_len", "lr")}
method = KnowledgeDistillation(**settings, states=("none",), save_every=0)

turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
made = artifact.load(given["student"], dtype=machine.weights_dtype(dtype))
machine.seed_everything(0)
windows = [{"input_ids": ids_T, "labels": ids_T} for ids_T in torch.from_numpy(np.load(given["windows"]))]
rows = Repeat(Rows(windows, name="bench", fingerprint="bench"))
data: Any = SimpleNamespace(training=lambda method: Batch(rows, batch_size=method.batch_size))
plan = method.plan(made.model, data)
train(replace(plan, watchers=(*plan.watchers, Turns())), method, dtype=dtype, quiet=True)
