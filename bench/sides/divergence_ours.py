"""The divergence of two models from their hidden states, by this project's kernel."""

from divergence_inputs import take_turns
from torch import Tensor

from overhaul.divergence import TeacherLinear, linear_divergence


def loss_of(hidden_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    return linear_divergence(hidden_ND, weight_VD, TeacherLinear(teacher_NE, teacher_VE))


take_turns(loss_of)
