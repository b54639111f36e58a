"""LLM.int8() as transformers and bitsandbytes have it: `load_in_8bit`, threshold 6."""

import logging

import decoding
import torch
import turn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
given = turn.settings()
turn.wait()
how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
model = AutoModelForCausalLM.from_pretrained(given["model"], quantization_config=how, dtype=torch.bfloat16).eval()
turn.tell()
decoding.take_turns(model, given)
