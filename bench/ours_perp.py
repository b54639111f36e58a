"""Our PERP on given windows. Arguments: norms|mask_lora MODEL TRAIN_WINDOWS HELDOUT_WINDOWS STEPS BATCH LR."""

from __future__ import annotations

import json
import sys
import time

import torch

from overhaul import artifact, catalog, machine
from overhaul.corpora import NO_CORPUS
from overhaul.data import Data
from overhaul.evaluate import perplexity
from overhaul.stream import Batch, Rows, Stream
from overhaul.train import train

which, path, train_path, heldout_path = sys.argv[1:5]
steps, batch, lr = int(sys.argv[5]), int(sys.argv[6]), float(sys.argv[7])
dtype = machine.compute_dtype("auto", torch.device("cpu"))
made = artifact.load(path)
windows_NT = torch.load(train_path)
heldout_NT = torch.load(heldout_path)
with torch.no_grad():
    catalog.find("prune", "magnitude").load()(sparsity=0.5).apply(made.model, None)
before = perplexity(made.model, heldout_NT, dtype=dtype).estimate.value


class Given(Data):
    """The windows of the bench instead of a corpus."""

    def training(self, settings: object) -> Stream:
        rows = [{"input_ids": ids, "labels": ids} for ids in windows_NT]
        return Batch(Rows(rows, name="windows", fingerprint="windows"), batch_size=batch)


groups = ("norms",) if which == "norms" else ("norms", "mask_lora")
settings = catalog.find("adapt", "perp").load()(
    train=groups, rank=8, alpha=16.0, steps=steps, batch_size=batch, seq_len=windows_NT.shape[1], lr=lr, save_every=0
)
machine.seed_everything(0)
began = time.perf_counter()
plan = settings.plan(made.model, Given(NO_CORPUS, made.processor))
history = train(plan, settings, dtype=dtype, quiet=True)
with torch.no_grad():
    plan.finish(made.model).to(made.dtype)
seconds = time.perf_counter() - began
after = perplexity(made.model, heldout_NT, dtype=dtype).estimate.value
print(json.dumps({"seconds": seconds, "before": before, "after": after}))
