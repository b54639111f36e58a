"""`overhaul prune wanda|sparsegpt` by its library: load, prune, write."""

import gc
import tempfile
from pathlib import Path

import numpy as np
import torch
import turn
from transformers import AutoConfig, AutoModelForCausalLM

from overhaul import artifact
from overhaul.journal import recording
from overhaul.machine import release_memory
from overhaul.prune.sparsegpt import SparseGPT
from overhaul.prune.wanda import Wanda
from overhaul.stream import Batch, Rows


def rehearse(model: Path) -> None:
    """Prunes a model of the same family with two narrow blocks, so that all code that runs later has been loaded."""
    config = AutoConfig.from_pretrained(
        model, num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    config.head_dim = 16
    with tempfile.TemporaryDirectory() as small:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(small)
        artifact.copy_companions(model, Path(small))
        prune(artifact.load(small).model, windows_NT[:4, :16])
    gc.collect()
    release_memory()


def prune(model: torch.nn.Module, ids_NT: torch.Tensor) -> None:
    rows = Rows([{"input_ids": ids_T} for ids_T in ids_NT], name="bench", fingerprint="bench")
    with recording(), torch.no_grad():
        method.apply(model, Batch(rows, batch_size=4))


given = turn.settings()
windows_NT = torch.from_numpy(np.load(given["windows"]))
method = {"wanda": Wanda, "sparsegpt": SparseGPT}[given["method"]](sparsity=given["sparsity"])

rehearse(Path(given["model"]))
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
made = artifact.load(given["model"])
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
