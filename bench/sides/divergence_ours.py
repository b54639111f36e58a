"""The divergence of two models from their hidden states, by this project's kernel; one loss with gradients a turn."""

import divergence_inputs
import torch
import turn

from overhaul.divergence import TeacherLinear, linear_divergence

given = turn.settings()
torch.manual_seed(0)
turn.wait()
hidden_ND, weight_VD, teacher_NE, teacher_VE = divergence_inputs.make(given)
turn.forget_peak()
turn.tell()

while True:
    turn.wait()
    hidden_ND.grad = weight_VD.grad = None
    loss = linear_divergence(hidden_ND, weight_VD, TeacherLinear(teacher_NE, teacher_VE))
    loss.backward()
    turn.tell(loss=loss.item())
