"""The divergence of two models by all logits of both and torch's kl_div."""

import torch
from divergence_inputs import take_turns
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def loss_of(hidden_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    with torch.no_grad():
        log_p_NV = F.log_softmax(F.linear(teacher_NE, teacher_VE), -1)
    log_q_NV = F.log_softmax(F.linear(hidden_ND, weight_VD), -1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)


take_turns(loss_of)
