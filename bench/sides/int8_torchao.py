"""int8 weights with int8 activations as torchao has them, in the blocks."""

import decoding
import torch
import turn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import AutoModelForCausalLM

given = turn.settings()
turn.wait()
model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.bfloat16).eval()
quantize_(model.model, Int8DynamicActivationInt8WeightConfig())
turn.tell()
decoding.take_turns(model, given)
