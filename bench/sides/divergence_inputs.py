"""What both sides of the divergence's bench compare: hidden states and embeddings of the size of a small model."""

from collections.abc import Callable
from typing import Any

import torch
import turn
from torch import Tensor


def take_turns(loss_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """One loss with gradients a turn; the first turn makes what it is taken of."""
    given = turn.settings()
    turn.wait()
    inputs = hidden_ND, weight_VD, *_ = _make(given)
    turn.forget_peak()
    turn.tell()
    while True:
        turn.wait()
        hidden_ND.grad = weight_VD.grad = None
        loss = loss_of(*inputs)
        loss.backward()
        told = loss.item()
        del loss  # and with it what it was computed from
        turn.tell(loss=told)


def _make(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and output embedding of a student, with gradients, and of a teacher; the same in every process."""
    tokens, width, words = given["tokens"], given["width"], given["words"]
    shapes = ((tokens, width), (words, width)) * 2
    random = torch.Generator().manual_seed(0)
    scales = (1.0, width**-0.5) * 2
    student_ND, student_VD, teacher_NE, teacher_VE = (
        scale * torch.randn(shape, generator=random) for shape, scale in zip(shapes, scales, strict=True)
    )
    return student_ND.requires_grad_(), student_VD.requires_grad_(), teacher_NE, teacher_VE
