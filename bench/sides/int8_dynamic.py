"""Dynamic quantization as torch has it: int8 weights, activations quantized tensor by tensor."""

import warnings

import decoding
import torch
import turn
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
given = turn.settings()
turn.wait()
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32).eval()
model.model = torch.ao.quantization.quantize_dynamic(model.model, {torch.nn.Linear}, dtype=torch.qint8)
turn.tell()
decoding.take_turns(model, given)
