"""transformers' Trainer on all parameters, bf16 autocast. Arguments: MODEL WINDOWS(N,T) STEPS BATCH."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

path, windows_path, steps, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
windows_NT = torch.load(windows_path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
rows = [{"input_ids": ids, "labels": ids} for ids in windows_NT[: steps * batch]]


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_args: object, **_kwargs: object) -> None:
        self.ends.append(time.perf_counter())


clock = Clock()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, bf16=True, use_cpu=True,
        learning_rate=5e-5, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock]).train()
seconds = [later - sooner for sooner, later in zip(clock.ends, clock.ends[1:], strict=False)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds_per_step": seconds[1:], "peak_rss_bytes": peak}))
