"""The divergence of two models by all logits of both and torch's kl_div; one loss with gradients a turn."""

import divergence_inputs
import torch
import turn
from torch.nn import functional as F  # noqa: N812

given = turn.settings()
torch.manual_seed(0)
turn.wait()
hidden_ND, weight_VD, teacher_NE, teacher_VE = divergence_inputs.make(given)
turn.forget_peak()
turn.tell()

while True:
    turn.wait()
    hidden_ND.grad = weight_VD.grad = None
    with torch.no_grad():
        log_p_NV = F.log_softmax(F.linear(teacher_NE, teacher_VE), -1)
    log_q_NV = F.log_softmax(F.linear(hidden_ND, weight_VD), -1)
    loss = F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)
    loss.backward()
    told = loss.item()
    del log_p_NV, log_q_NV, loss
    turn.tell(loss=told)
