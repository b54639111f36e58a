"""Distillation as a script of one's own has it: transformers' models, their logits, torch's kl_div; a step a turn."""

import contextlib

import numpy as np
import torch
import turn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

given = turn.settings()
dtype = getattr(torch, given["dtype"])
precision = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()

turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
student = AutoModelForCausalLM.from_pretrained(given["student"], dtype=torch.float32).train()
teacher = AutoModelForCausalLM.from_pretrained(given["teacher"], dtype=dtype).eval()
optimizer = torch.optim.AdamW(student.parameters(), lr=given["lr"], weight_decay=0.0, fused=True)
windows_NT = torch.from_numpy(np.load(given["windows"]))
turn.tell()  # both models are loaded

for ids_BT in windows_NT.split(given["batch_size"]):
    turn.wait()
    optimizer.zero_grad()
    with precision:
        with torch.no_grad():
            teacher_BTV = teacher(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        student_BTV = student(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        log_q_NV = F.log_softmax(student_BTV.flatten(0, 1).float(), -1)
        log_p_NV = F.log_softmax(teacher_BTV.flatten(0, 1).float(), -1)
        loss = F.kl_div(log_q_NV, log_p_NV, reduction="batchmean", log_target=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    del teacher_BTV, student_BTV, log_q_NV, log_p_NV, loss
    turn.tell()
turn.wait()
