"""`overhaul prune wanda|sparsegpt` by its library: load, prune, write."""

from pathlib import Path

import numpy as np
import torch
import turn

from overhaul import artifact
from overhaul.journal import recording
from overhaul.prune.sparsegpt import SparseGPT
from overhaul.prune.wanda import Wanda
from overhaul.stream import Batch, Rows

given = turn.settings()
windows_NT = torch.from_numpy(np.load(given["windows"]))
method = {"wanda": Wanda, "sparsegpt": SparseGPT}[given["method"]](sparsity=given["sparsity"])

turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
made = artifact.load(given["model"])
turn.tell(model_bytes=sum(p.nbytes for p in made.model.parameters()))

turn.wait()
turn.forget_peak()
rows = Rows([{"input_ids": ids_T} for ids_T in windows_NT], name="bench", fingerprint="bench")
with recording(), torch.no_grad():
    method.apply(made.model, Batch(rows, batch_size=4))
turn.tell()

turn.wait()
out = Path(given["out"])
out.mkdir()
artifact.write_model(made, out)
turn.tell()
turn.wait()
