"""Our pruning on given windows, timed as the peer is. Arguments: wanda|sparsegpt MODEL WINDOWS OUT."""

from __future__ import annotations

import json
import sys
import time

import torch

from overhaul import artifact, catalog, machine
from overhaul.stream import Batch, Rows

method, path, windows_path, out = sys.argv[1:]
windows_NT = torch.load(windows_path)
imported = machine.peak_rss_bytes()
made = artifact.load(path)
machine.reset_peak_rss()
settings = catalog.find("prune", method).load()(sparsity=0.5, samples=len(windows_NT), seq_len=windows_NT.shape[1])
rows = Rows([{"input_ids": ids} for ids in windows_NT], name="windows", fingerprint="windows")
began = time.perf_counter()
with torch.no_grad():
    model = settings.apply(made.model, Batch(rows, batch_size=4))
seconds = time.perf_counter() - began
peak = machine.peak_rss_bytes()
model.save_pretrained(out)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak, "imported_bytes": imported, "model_bytes": size}))
