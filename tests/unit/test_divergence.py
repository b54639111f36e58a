"""The chunked kernel against torch's own kl_div over all logits, and the top words against what they leave out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from overhaul import vocabulary_loss
from overhaul.divergence import (
    Direction,
    TeacherLinear,
    TeacherLogits,
    TopWords,
    linear_divergence,
    logits_divergence,
    swap_,
    top_words,
)

TOKENS, WIDTH, TEACHER_WIDTH, WORDS = 23, 8, 12, 50
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


def student(dtype: torch.dtype = torch.float64, words: int = WORDS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output embedding and bias, all trainable."""
    random = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, WIDTH), (words, WIDTH), (words,))
    hidden_ND, weight_VD, bias_V = (
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )
    return hidden_ND, weight_VD, bias_V


def teacher(dtype: torch.dtype = torch.float64, words: int = WORDS) -> TeacherLinear:
    random = torch.Generator().manual_seed(1)
    shapes = ((TOKENS, TEACHER_WIDTH), (words, TEACHER_WIDTH), (words,))
    return TeacherLinear(*(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes))


def logits_of(linear: TeacherLinear) -> Tensor:
    return F.linear(*linear[:3])


def plain(student_NV: Tensor, teacher_NV: Tensor, temperature: float, direction: Direction) -> Tensor:
    """The definition, by torch's own functions."""
    log_q, log_p = F.log_softmax(student_NV / temperature, -1), F.log_softmax(teacher_NV / temperature, -1)
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    return temperature**2 * F.kl_div(first, second, reduction="sum", log_target=True)


@both_directions
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_loss_and_gradients_are_torchs(dtype, tolerance, chunk_tokens, temperature, direction):
    leaves, above = student(dtype), teacher(dtype)
    hidden_ND, weight_VD, bias_V = leaves

    loss = linear_divergence(
        hidden_ND, weight_VD, above, bias_V, temperature=temperature, direction=direction, chunk_tokens=chunk_tokens
    )
    reference = plain(F.linear(*leaves), logits_of(above), temperature, direction)

    torch.testing.assert_close(loss, reference, rtol=tolerance, atol=tolerance)
    ours, theirs = torch.autograd.grad(loss / 19, leaves), torch.autograd.grad(reference / 19, leaves)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@both_directions
def test_rows_in_several_blocks_change_nothing(direction, monkeypatch: pytest.MonkeyPatch):
    (hidden_ND, weight_VD, _), above = student(), teacher()
    whole = linear_divergence(hidden_ND, weight_VD, above, direction=direction)

    monkeypatch.setattr(vocabulary_loss, "_ROWS_ELEMENTS", 3 * WORDS)
    in_blocks = linear_divergence(hidden_ND, weight_VD, above, direction=direction)

    torch.testing.assert_close(in_blocks, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (hidden_ND, weight_VD)) for loss in (in_blocks, whole)))


@both_directions
@pytest.mark.parametrize("known", [None, 5])
def test_gradients_are_those_of_finite_differences(direction, known):
    # Not torch's gradcheck, which runs one backward pass again and again.
    leaves, above = student(), teacher()
    given = above if known is None else top_words(above, known, num_words=WORDS, temperature=1.5)

    def loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        return linear_divergence(hidden_ND, weight_VD, given, bias_V, temperature=1.5, direction=direction)

    grads = torch.autograd.grad(loss(*leaves), leaves)

    random, step = torch.Generator().manual_seed(2), 1e-5
    for _ in range(5):
        ways = [torch.randn(leaf.shape, generator=random, dtype=leaf.dtype) for leaf in leaves]
        with torch.no_grad():
            ahead, behind = (
                loss(*(leaf + sign * step * way for leaf, way in zip(leaves, ways, strict=True))) for sign in (1, -1)
            )
        slope = sum((grad * way).sum() for grad, way in zip(grads, ways, strict=True))
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)


@both_directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation_from_itself_costs_nothing_and_changes_nothing(direction, dtype):
    hidden_ND, weight_VD, bias_V = student(dtype)
    itself = TeacherLinear(hidden_ND.detach(), weight_VD.detach(), bias_V.detach())

    loss = linear_divergence(hidden_ND, weight_VD, itself, bias_V, direction=direction)
    loss.backward()

    assert loss.item() == 0.0
    for leaf in (hidden_ND, weight_VD, bias_V):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_a_certain_teacher_is_cross_entropy():
    (hidden_ND, weight_VD, _), labels_N = student(), torch.arange(TOKENS) % WORDS
    certain = TeacherLogits(200.0 * F.one_hot(labels_N, WORDS).double())

    loss = linear_divergence(hidden_ND, weight_VD, certain)

    torch.testing.assert_close(loss, F.cross_entropy(hidden_ND @ weight_VD.t(), labels_N, reduction="sum"))


def test_words_that_underflow_have_an_exact_loss():
    student_NV, above = torch.tensor([[0.0, 300.0]]).requires_grad_(), TeacherLogits(torch.tensor([[300.0, 0.0]]))

    losses = [logits_divergence(student_NV, above, direction=direction).item() for direction in DIRECTIONS]

    assert losses == [300.0, 300.0]


@both_directions
def test_whole_logits_give_the_same(direction):
    leaves, above = student(), teacher()
    whole_NV = F.linear(*leaves)

    ours = logits_divergence(whole_NV, TeacherLogits(logits_of(above)), temperature=2.0, direction=direction)
    chunked = linear_divergence(leaves[0], leaves[1], above, leaves[2], temperature=2.0, direction=direction)

    torch.testing.assert_close(ours, chunked)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(chunked, leaves))


@both_directions
@pytest.mark.parametrize(("own", "theirs"), [(WORDS, WORDS - 7), (WORDS - 7, WORDS)])
def test_rows_that_only_one_model_has_are_left_out(own, theirs, direction):
    (hidden_ND, weight_VD, _), above = student(words=own), teacher(words=theirs)
    shared = min(own, theirs)

    loss = linear_divergence(hidden_ND, weight_VD, above, direction=direction)
    reference = plain((hidden_ND @ weight_VD.t())[:, :shared], logits_of(above)[:, :shared], 1.0, direction)

    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(*(torch.autograd.grad(one, (hidden_ND, weight_VD)) for one in (loss, reference)))


def test_bf16_is_as_close_as_autocast():
    leaves, above = student(torch.float32), teacher(torch.float32)
    exact = torch.autograd.grad(plain(F.linear(*leaves), logits_of(above), 1.0, "forward"), leaves[:2])

    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_divergence(leaves[0], leaves[1], above, leaves[2])
        theirs = plain(F.linear(*leaves), logits_of(above), 1.0, "forward")

    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
    grads, peers = (torch.autograd.grad(loss, leaves[:2]) for loss in (ours, theirs))
    for grad, peer, reference in zip(grads, peers, exact, strict=True):
        assert (grad - reference).norm() <= 1.5 * (peer - reference).norm()


def test_nothing_is_recorded_where_nothing_is_trained():
    (hidden_ND, weight_VD, bias_V), above = student(), teacher()
    trained = linear_divergence(hidden_ND, weight_VD, above, bias_V)

    with torch.no_grad():
        unrecorded = linear_divergence(hidden_ND, weight_VD, above, bias_V)

    assert not unrecorded.requires_grad
    torch.testing.assert_close(unrecorded, trained.detach())


# The likeliest words only.


def bucketed(student_NV: Tensor, teacher_NV: Tensor, ids_NK: Tensor, direction: Direction) -> Tensor:
    """The definition over K + 1 outcomes, by torch's own functions."""

    def outcomes(logits_NV: Tensor) -> Tensor:
        probs_NV = logits_NV.softmax(-1)
        others_N1 = probs_NV.scatter(1, ids_NK, 0.0).sum(-1, keepdim=True)
        return torch.cat([probs_NV.gather(1, ids_NK), others_N1], -1).log()

    first, second = outcomes(student_NV), outcomes(teacher_NV)
    first, second = (first, second) if direction == "forward" else (second, first)
    return F.kl_div(first, second, reduction="sum", log_target=True)


@both_directions
@pytest.mark.parametrize("known", [1, 5, WORDS - 1])
def test_known_words_and_one_outcome_for_all_others(known, direction):
    leaves, above = student(), teacher()
    words = top_words(above, known, num_words=WORDS, chunk_tokens=7)

    loss = linear_divergence(leaves[0], leaves[1], words, leaves[2], direction=direction, chunk_tokens=6)
    reference = bucketed(F.linear(*leaves), logits_of(above), words.ids_NK, direction)

    torch.testing.assert_close(words.log_probs_NK, logits_of(above).log_softmax(-1).topk(known).values)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(reference, leaves))


@both_directions
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_more_known_words_come_closer_from_below_and_all_of_them_are_the_whole(temperature, direction):
    leaves, above = student(), teacher()
    how: dict[str, Any] = {"temperature": temperature, "direction": direction}
    whole = linear_divergence(leaves[0], leaves[1], above, leaves[2], **how)
    counts = (1, 2, 8, 30, WORDS - 1, WORDS)

    losses = [
        linear_divergence(
            leaves[0], leaves[1], top_words(above, known, num_words=WORDS, temperature=temperature), leaves[2], **how
        )
        for known in counts
    ]

    values = torch.stack(losses)
    assert (values.diff() >= -1e-12).all()
    assert values[0] < 0.9 * whole
    torch.testing.assert_close(losses[-1], whole)
    torch.testing.assert_close(torch.autograd.grad(losses[-1], leaves), torch.autograd.grad(whole, leaves))


def test_a_small_tail_keeps_its_digits():
    logits_NV = torch.tensor([[40.0, 0.0, 0.0, 0.0]])

    words = top_words(TeacherLogits(logits_NV), 1, num_words=4)

    torch.testing.assert_close(words.log_tail_N, torch.tensor([3.0]).log() - 40, rtol=1e-6, atol=0)
    student_NV = logits_NV.clone().requires_grad_()
    logits_divergence(student_NV, words).backward()
    assert student_NV.grad is not None
    assert student_NV.grad.abs().max() < 1e-15


def test_a_student_that_finds_the_tail_impossible_has_a_finite_loss():
    student_NV = torch.tensor([[400.0, 0.0, 0.0]]).requires_grad_()
    words = TopWords(torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log(), 3)

    loss = logits_divergence(student_NV, words)
    loss.backward()

    expected = 0.5 * (torch.tensor(0.5).log() * 2 + 400 - torch.tensor(2.0).log())
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(student_NV.grad, torch.tensor([[0.5, -0.25, -0.25]]))


GOLD = torch.randint(WORDS, (TOKENS,), generator=torch.Generator().manual_seed(2))


def swapped() -> Tensor:
    """The teacher's logits with two of each token exchanged, one after the other."""
    logits_NV = logits_of(teacher()).clone()
    for logits_V, gold in zip(logits_NV, GOLD.tolist(), strict=True):
        top = int(logits_V.argmax())
        logits_V[gold], logits_V[top] = logits_V[top].clone(), logits_V[gold].clone()
    return logits_NV


def test_swapped_logits_have_the_right_word_on_top_and_the_teachers_entropy():
    before, after = logits_of(teacher()), swap_(logits_of(teacher()), GOLD)

    assert (after.argmax(-1) == GOLD).all()
    assert torch.equal(after, swapped())
    assert torch.equal(before.sort(-1).values, after.sort(-1).values)
    entropies = [torch.distributions.Categorical(logits=logits).entropy() for logits in (before, after)]
    assert torch.allclose(*entropies, atol=1e-12)


@both_directions
@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
def test_a_swapped_teacher_is_torchs_kl_div_with_swapped_logits(direction, chunk_tokens):
    hidden_ND, weight_VD, bias_V = student()
    taught = teacher()._replace(gold_N=GOLD)

    loss = linear_divergence(hidden_ND, weight_VD, taught, bias_V, direction=direction, chunk_tokens=chunk_tokens)

    leaves = (hidden_ND, weight_VD, bias_V)
    wanted = plain(F.linear(*leaves), swapped(), 1.0, direction)
    assert torch.allclose(loss, wanted, rtol=1e-12)
    for own, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert torch.allclose(own, theirs, atol=1e-10)


def test_the_gradient_of_a_students_logits_is_its_probability_less_the_swapped_teachers():
    logits_NV = F.linear(*student()).detach().requires_grad_()
    theirs = logits_of(teacher())
    before = theirs.clone()

    logits_divergence(logits_NV, TeacherLogits(theirs, GOLD)).backward()

    assert logits_NV.grad is not None
    assert torch.allclose(logits_NV.grad, logits_NV.softmax(-1) - swapped().softmax(-1), atol=1e-12)
    assert torch.equal(theirs, before)


def test_where_the_teacher_is_right_a_swap_is_plain_distillation():
    hidden_ND, weight_VD, bias_V = student()
    right = teacher()._replace(gold_N=logits_of(teacher()).argmax(-1))

    assert torch.equal(
        linear_divergence(hidden_ND, weight_VD, right, bias_V),
        linear_divergence(hidden_ND, weight_VD, teacher(), bias_V),
    )
