"""Kullback-Leibler divergence between two models' next words, without ever holding all logits of either.

    forward   T^2 KL(p || q)    p: teacher, q: student, both softmax(logits / T)
    reverse   T^2 KL(q || p)

The factor T^2 keeps gradients of one size whatever the temperature (Hinton, Vinyals, Dean, 2015). The teacher may
also be known by its K likeliest words and the probability of all others together; then p and q are distributions
over K + 1 outcomes, and the divergence is a lower bound of the whole one which it reaches at K = V.

Shapes: N tokens, D hidden width of the student, E of the teacher, V words, K of them known, C tokens of one chunk,
R tokens of one block of rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from overhaul.vocabulary_loss import (
    CHUNK_TOKENS,
    compute_dtype,
    linear_loss,
    logits_loss,
    row_blocks,
    row_buffer,
    slices,
    softmax_,
)

Direction = Literal["forward", "reverse"]

_CHUNK_TOKENS = CHUNK_TOKENS // 2
"""Two models' logits are there at a time."""


class TeacherLinear(NamedTuple):
    """What the teacher predicts, by its last hidden states (N, E) and its output embedding (V, E).

    With `gold_N`, the words that really follow, each of these changes places with the likeliest one: see `swap_`.
    """

    hidden_NE: Tensor
    weight_VE: Tensor
    bias_V: Tensor | None = None
    gold_N: Tensor | None = None


class TeacherLogits(NamedTuple):
    """What the teacher predicts, by logits (N, V) that are there as a whole; `gold_N` as in `TeacherLinear`."""

    logits_NV: Tensor
    gold_N: Tensor | None = None


class TopWords(NamedTuple):
    """What the teacher predicts, by its likeliest words.

    Attributes:
        ids_NK: the words, int64.
        log_probs_NK: logarithms of their probabilities, at the temperature they are used at.
        log_tail_N: logarithm of the probability of all other words together; -inf where there are no others.
        num_words: how many words the probabilities are over: the first ones, where a model has more.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    log_tail_N: Tensor
    num_words: int


Teacher = TeacherLinear | TeacherLogits | TopWords


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher: Teacher,
    bias_V: Tensor | None = None,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    chunk_tokens: int = _CHUNK_TOKENS,
) -> Tensor:
    """The sum over tokens of the divergence between a teacher and softmax(hidden weight^T + bias), in nats.

    Where one model has more words than the other, as rows that only fill its embedding up, the first words that
    both have are compared.

    Args:
        hidden_ND: last hidden states of the student.
        weight_VD: its output embedding; its gradient is computed only if it requires one.
        teacher: what the teacher predicts for the same tokens; it gets no gradient.
        bias_V: added to the student's logits.
        temperature: both models' logits are divided by it; the loss is multiplied by its square. A teacher that is
            known by its top words has it in its probabilities already.
        direction: `forward` or `reverse`.
        chunk_tokens: tokens whose logits exist at one time; changes memory and speed, not the result.

    Returns:
        A scalar, with the arithmetic and the single backward pass of `linear_loss`.
    """
    compare = _comparison(teacher, temperature, direction)
    return linear_loss(hidden_ND, weight_VD, bias_V, compare, chunk_tokens=chunk_tokens)


def logits_divergence(
    logits_NV: Tensor, teacher: Teacher, *, temperature: float = 1.0, direction: Direction = "forward"
) -> Tensor:
    """The same from logits of the student that are there as a whole."""
    return logits_loss(logits_NV, _comparison(teacher, temperature, direction))


@torch.no_grad()
def top_words(
    teacher: TeacherLinear | TeacherLogits,
    count: int,
    *,
    num_words: int,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TopWords:
    """The teacher's `count` likeliest words for each token, and the probability of all others, exactly.

    Args:
        teacher: what it predicts.
        count: 0 < count <= num_words.
        num_words: probabilities are over the first so many words.
        temperature: logits are divided by it.
        chunk_tokens: tokens whose logits exist at one time.
    """
    logits_of, num_tokens = _LogitsOf(teacher), len(teacher[0])
    ids, log_probs, log_tail = [], [], []
    for at in slices(num_tokens, chunk_tokens):
        logits_CV = logits_of(at)[:, :num_words]
        buffer_RV = row_buffer(logits_CV)
        for rows in row_blocks(logits_CV):
            scratch_RV = buffer_RV[: rows.stop - rows.start].copy_(logits_CV[rows]).div_(temperature)
            found = scratch_RV.topk(count)
            lse_R1 = scratch_RV.logsumexp(-1, keepdim=True)
            ids.append(found.indices)
            log_probs.append(found.values - lse_R1)
            scratch_RV.scatter_(1, found.indices, -torch.inf)
            # Of the other words' logits, not one minus the rest: that would have no digits left for a small tail.
            log_tail.append(scratch_RV.logsumexp(-1) - lse_R1[:, 0])
    return TopWords(torch.cat(ids), torch.cat(log_probs), torch.cat(log_tail), num_words)


class _LogitsOf:
    """The teacher's logits of a chunk of tokens, made when they are asked for, in a buffer that is used again."""

    def __init__(self, teacher: TeacherLinear | TeacherLogits) -> None:
        self.teacher = teacher
        self.buffer_CV: Tensor | None = None
        if isinstance(teacher, TeacherLinear):
            dtype = compute_dtype(teacher.hidden_NE, teacher.weight_VE)
            self.hidden_NE, self.weight_VE = teacher.hidden_NE.detach().to(dtype), teacher.weight_VE.detach().to(dtype)

    def __call__(self, at: slice) -> Tensor:
        logits_CV, gold_N = self._made(at), self.teacher.gold_N
        if gold_N is None:
            return logits_CV
        # Whole logits are the caller's.
        return swap_(logits_CV.clone() if isinstance(self.teacher, TeacherLogits) else logits_CV, gold_N[at])

    def _made(self, at: slice) -> Tensor:
        if isinstance(self.teacher, TeacherLogits):
            return self.teacher.logits_NV[at].detach()
        hidden_CE = self.hidden_NE[at]
        if self.buffer_CV is None:  # the first chunk is the largest
            self.buffer_CV = hidden_CE.new_empty(len(hidden_CE), len(self.weight_VE))
        logits_CV = torch.mm(hidden_CE, self.weight_VE.t(), out=self.buffer_CV[: len(hidden_CE)])
        return logits_CV if self.teacher.bias_V is None else logits_CV.add_(self.teacher.bias_V.detach())


def swap_(logits_CV: Tensor, gold_C: Tensor) -> Tensor:
    """Exchanges the logit of the word that really follows with the largest one, in place (Jiang et al., 2025).

    What was right stays as it is; elsewhere the right word gets the confidence that the teacher had in a wrong one, and
    all other words keep theirs, so that the entropy is the teacher's.
    """
    top_C1 = logits_CV.max(-1, keepdim=True)
    gold_C1 = gold_C[:, None]
    own_C1 = logits_CV.gather(1, gold_C1)
    return logits_CV.scatter_(1, gold_C1, top_C1.values).scatter_(1, top_C1.indices, own_C1)


def _comparison(teacher: Teacher, temperature: float, direction: Direction) -> _WithAllWords | _WithTopWords:
    kind = _WithTopWords if isinstance(teacher, TopWords) else _WithAllWords
    return kind(teacher, temperature, direction)  # pyright: ignore[reportArgumentType] - each gets its own kind


class _WithAllWords:
    """The divergence from a teacher whose logits can be had; the gradient of a student's logit is

    forward   T (q - p)
    reverse   T q (log q - log p - KL(q || p))
    """

    def __init__(self, teacher: TeacherLinear | TeacherLogits, temperature: float, direction: Direction) -> None:
        self.logits_of, self.temperature, self.direction = _LogitsOf(teacher), temperature, direction

    def __call__(self, at: slice, logits_CV: Tensor, *, with_gradient: bool) -> Tensor:
        teacher_CV = self.logits_of(at)
        student_CV = _shared_words_(logits_CV, teacher_CV.shape[1], with_gradient=with_gradient)
        p_buffer, q_buffer, gap_buffer = (row_buffer(student_CV) for _ in range(3))
        kl_C = p_buffer.new_empty(len(student_CV))
        for rows in row_blocks(student_CV):
            num_rows = rows.stop - rows.start
            p_RV = p_buffer[:num_rows].copy_(teacher_CV[rows, : student_CV.shape[1]])
            q_RV = q_buffer[:num_rows].copy_(student_CV[rows])
            if self.temperature != 1:
                p_RV /= self.temperature
                q_RV /= self.temperature
            gap_RV = torch.sub(p_RV, q_RV, out=gap_buffer[:num_rows])
            (top_p_R, log_p_R), (top_q_R, log_q_R) = softmax_(p_RV), softmax_(q_RV)
            gap_RV -= ((top_p_R - log_p_R) - (top_q_R - log_q_R))[:, None]  # now log p - log q
            if self.direction == "forward":
                kl_C[rows] = gap_RV.mul_(p_RV).sum(-1)
                grad_RV = q_RV.sub_(p_RV)
            else:
                kl_R = gap_RV.mul_(q_RV).sum(-1).neg_()
                kl_C[rows] = kl_R
                grad_RV = q_RV.mul_(kl_R[:, None]).add_(gap_RV).neg_()
            if with_gradient:
                student_CV[rows] = grad_RV if self.temperature == 1 else grad_RV.mul_(self.temperature)
        return kl_C.mul_(self.temperature**2)


class _WithTopWords:
    """The divergence over K + 1 outcomes, where q_t is the student's probability of all words but the K known ones.

    forward   T (q_i - p_i) for a known word, T (q_i - p_t q_i / q_t) for another
    reverse   T q_i (log q_i - log p_i - KL) for a known word, T q_i (log q_t - log p_t - KL) for another
    """

    def __init__(self, teacher: TopWords, temperature: float, direction: Direction) -> None:
        self.teacher, self.temperature, self.direction = teacher, temperature, direction

    def __call__(self, at: slice, logits_CV: Tensor, *, with_gradient: bool) -> Tensor:
        student_CV = _shared_words_(logits_CV, self.teacher.num_words, with_gradient=with_gradient)
        q_buffer, rest_buffer = row_buffer(student_CV), row_buffer(student_CV)
        kl_C = q_buffer.new_empty(len(student_CV))
        for rows in row_blocks(student_CV):
            own = slice(at.start + rows.start, at.start + rows.stop)
            q_RV = q_buffer[: rows.stop - rows.start].copy_(student_CV[rows]).div_(self.temperature)
            kl_C[rows], grad_RV = self._compare(q_RV, rest_buffer[: len(q_RV)], own)
            if with_gradient:
                student_CV[rows] = grad_RV.mul_(self.temperature)
        return kl_C.mul_(self.temperature**2)

    def _compare(self, q_RV: Tensor, rest_RV: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """The divergences of a block of rows, and their gradients in the scaled logits, in place of these."""
        ids_RK, log_p_RK = self.teacher.ids_NK[at], self.teacher.log_probs_NK[at].to(q_RV.dtype)
        log_p_tail_R = self.teacher.log_tail_N[at].to(q_RV.dtype)
        has_tail = ids_RK.shape[1] < q_RV.shape[1]
        known_RK = q_RV.gather(1, ids_RK)
        rest_RV.copy_(q_RV).scatter_(1, ids_RK, -torch.inf)
        lse_R = torch.sub(*softmax_(q_RV))
        log_q_RK = known_RK - lse_R[:, None]
        if has_tail:
            # A softmax over the other words alone: q_i / q_t, and log q_t, without underflow.
            log_q_tail_R = torch.sub(*softmax_(rest_RV)) - lse_R
            tail_gap_R = log_p_tail_R - log_q_tail_R
        else:
            log_q_tail_R, tail_gap_R = log_p_tail_R, torch.zeros_like(log_p_tail_R)
            rest_RV.zero_()
        gap_RK = log_p_RK - log_q_RK
        if self.direction == "forward":
            p_RK, p_tail_R = log_p_RK.exp(), log_p_tail_R.exp()
            kl_R = (p_RK * gap_RK).sum(-1) + p_tail_R * tail_gap_R
            target_RV = rest_RV.mul_(p_tail_R[:, None]).scatter_(1, ids_RK, p_RK)
            return kl_R, q_RV.sub_(target_RV)
        kl_R = -(log_q_RK.exp() * gap_RK).sum(-1) - log_q_tail_R.exp() * tail_gap_R
        excess_RV = rest_RV.copy_(-(tail_gap_R + kl_R)[:, None].expand_as(rest_RV))
        return kl_R, q_RV.mul_(excess_RV.scatter_(1, ids_RK, -(gap_RK + kl_R[:, None])))


def _shared_words_(logits_CV: Tensor, num_words: int, *, with_gradient: bool) -> Tensor:
    """The logits of the first words, which both models have; those that only the student has get no gradient."""
    if with_gradient:
        logits_CV[:, num_words:] = 0
    return logits_CV[:, :num_words]
