"""Our loop on given windows. Arguments: full|lora MODEL WINDOWS(N,T) STEPS BATCH."""

from __future__ import annotations

import json
import sys

import torch

from overhaul import artifact, catalog, machine
from overhaul.corpora import NO_CORPUS
from overhaul.data import Data
from overhaul.stream import Batch, Rows, Stream
from overhaul.train import train

method, path, windows_path, steps, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
windows_NT = torch.load(windows_path)
made = artifact.load(path)
settings = catalog.find("adapt", method).load()(
    steps=steps, batch_size=batch, seq_len=windows_NT.shape[1], save_every=0
)


class Given(Data):
    """The windows of the bench instead of a corpus."""

    def training(self, settings: object) -> Stream:
        rows = [{"input_ids": ids, "labels": ids} for ids in windows_NT]
        return Batch(Rows(rows, name="windows", fingerprint="windows"), batch_size=batch)


plan = settings.plan(made.model, Given(NO_CORPUS, made.processor))
history = train(plan, settings, dtype=machine.compute_dtype("auto", torch.device("cpu")), quiet=True)
ends = [point["seconds"] for point in history.points]
seconds = [later - sooner for sooner, later in zip(ends, ends[1:], strict=False)]
print(json.dumps({"seconds_per_step": seconds[1:], "peak_rss_bytes": machine.peak_rss_bytes()}))
