"""`reduce_intruder_dimension` of peft: the same decompositions, and new factors; one call a turn."""

import torch
import turn
from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from transformers import AutoModelForCausalLM

given = turn.settings()
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing loaded

for number in range(3 * given["rounds"]):
    turn.wait()
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, given["other"] if number % 3 == 1 else given["adapter"])
    told: list[str] = []
    with torch.no_grad():
        reduce_intruder_dimension(tuned, logging_sink=told.append)
    turn.tell(intruders=sum(int(line.rsplit(" ", 1)[1]) for line in told if "Intruders: " in line))
turn.wait()
