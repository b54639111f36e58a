"""`overhaul prune wanda|sparsegpt` by its library: load, prune, write."""

import gc
from pathlib import Path

import numpy as np
import torch
import turn
from small import small_copy

from overhaul import artifact, machine
from overhaul.journal import recording
from overhaul.machine import release_memory
from overhaul.prune.sparsegpt import SparseGPT
from overhaul.prune.wanda import Wanda
from overhaul.stream import Batch, Rows


def prune(model: torch.nn.Module, ids_NT: torch.Tensor) -> None:
    rows = Rows([{"input_ids": ids_T} for ids_T in ids_NT], name="bench", fingerprint="bench")
    with recording(), torch.no_grad():
        method.apply(model, Batch(rows, batch_size=4))


given = turn.settings()
windows_NT = torch.from_numpy(np.load(given["windows"]))
device = torch.device("cpu")
dtype = machine.weights_dtype(machine.compute_dtype("auto", device))  # as the command line has it
method = {"wanda": Wanda, "sparsegpt": SparseGPT}[given["method"]](sparsity=given["sparsity"])

with small_copy(given["model"]) as small:
    prune(artifact.load(small, dtype=dtype).model, windows_NT[:4, :16])
gc.collect()
release_memory()
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported and was used once, nothing is loaded

turn.wait()
made = artifact.load(given["model"], dtype=dtype)
turn.tell(model_bytes=sum(p.nbytes for p in made.model.parameters()))

turn.wait()
turn.forget_peak()
prune(made.model, windows_NT)
turn.tell()

turn.wait()
out = Path(given["out"])
out.mkdir()
artifact.write_model(made, out)
turn.tell()
turn.wait()
