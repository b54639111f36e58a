"""`overhaul prune magnitude` and `overhaul adapt perp` by their library, a few optimizer steps a turn."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import turn

from overhaul import artifact, machine
from overhaul.adapt.perp import Perp
from overhaul.journal import recording
from overhaul.prune.magnitude import Magnitude
from overhaul.stream import Batch, Rows
from overhaul.train import train
from overhaul.watch import Watcher


class Turns(Watcher):
    """Ends a turn after every few steps."""

    def start(self, model: torch.nn.Module) -> None:
        turn.wait()

    def step(self, model: torch.nn.Module, step: int) -> None:
        if step % given["steps_a_turn"] == 0:
            turn.tell()
            turn.wait()


given = turn.settings()
dtype = getattr(torch, given["compute_dtype"])
turn.wait()
machine.seed_everything(given["seed"])
made = artifact.load(given["model"], dtype=machine.weights_dtype(dtype))  # as the command line has it
with recording(), torch.no_grad():
    Magnitude(sparsity=0.5).apply(made.model, None)
turn.tell()

settings: dict[str, Any] = {
    key: given[key] for key in ("train", "steps", "batch_size", "seq_len", "lr", "rank", "alpha")
}
method = Perp(**settings, save_every=0)
windows = [{"input_ids": ids_T, "labels": ids_T} for ids_T in torch.from_numpy(np.load(given["windows"]))]
rows = Rows(windows, name="bench", fingerprint="bench")
data: Any = SimpleNamespace(training=lambda method: Batch(rows, batch_size=method.batch_size))
plan = method.plan(made.model, data)
plan = replace(plan, watchers=(*plan.watchers, Turns()))
train(plan, method, dtype=dtype, quiet=True)
with torch.no_grad():
    plan.finish(plan.model)
Path(given["out"]).mkdir()
artifact.write_model(made, Path(given["out"]))
turn.tell()
turn.wait()
