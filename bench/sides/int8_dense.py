"""The dense model with transformers and torch, in one precision."""

import decoding
import torch
import turn
from transformers import AutoModelForCausalLM

given = turn.settings()
turn.wait()
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"])).eval()
turn.tell()
decoding.take_turns(model, given)
