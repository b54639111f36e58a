"""Full fine-tuning with transformers' Trainer, bf16 autocast where bf16 is fast, one optimizer step a turn."""

import os

import numpy as np
import torch
import turn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Windows(Dataset):
    def __init__(self, windows_NT: np.ndarray) -> None:
        self.windows_NT = torch.from_numpy(windows_NT)

    def __len__(self) -> int:
        return len(self.windows_NT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows_NT[index], "labels": self.windows_NT[index]}


class Turns(TrainerCallback):
    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        turn.wait()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        turn.tell()


given = turn.settings()
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
turn.tell()

arguments = TrainingArguments(
    output_dir=given["work"],
    per_device_train_batch_size=given["batch_size"],
    max_steps=given["steps"],
    learning_rate=given["lr"],
    bf16=given["compute_dtype"] == "bfloat16",
    use_cpu=True,
    warmup_steps=given["steps"] // 10,
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
Trainer(model, arguments, train_dataset=Windows(np.load(given["windows"])), callbacks=[Turns()]).train()
turn.wait()
