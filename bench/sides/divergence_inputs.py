"""What both sides of the divergence's bench compare: hidden states and embeddings of the size of a small model."""

from typing import Any

import torch
from torch import Tensor


def make(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and output embedding of a student, with gradients, and of a teacher; the same in every process."""
    tokens, width, words = given["tokens"], given["width"], given["words"]
    shapes = ((tokens, width), (words, width)) * 2
    random = torch.Generator().manual_seed(0)
    scales = (1.0, width**-0.5) * 2
    student_ND, student_VD, teacher_NE, teacher_VE = (
        scale * torch.randn(shape, generator=random) for shape, scale in zip(shapes, scales, strict=True)
    )
    return student_ND.requires_grad_(), student_VD.requires_grad_(), teacher_NE, teacher_VE
