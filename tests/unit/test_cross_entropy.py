"""The chunked kernel against torch's own cross-entropy over all logits."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from overhaul.cross_entropy import linear_cross_entropy, logits_cross_entropy, token_nll

TOKENS, WIDTH, WORDS = 23, 8, 50


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output embedding, bias (all trainable) and labels, four of them ignored."""
    random = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(TOKENS, WIDTH, generator=random).to(dtype).requires_grad_()
    weight_VD = torch.randn(WORDS, WIDTH, generator=random).to(dtype).requires_grad_()
    bias_V = torch.randn(WORDS, generator=random).to(dtype).requires_grad_()
    labels_N = torch.randint(WORDS, (TOKENS,), generator=random)
    labels_N[[0, 3, 4, 22]] = -100
    return hidden_ND, weight_VD, bias_V, labels_N


def plain(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias_V: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, weight_VD, bias_V), labels_N, reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 7, 19, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_loss_and_gradients_are_torchs(dtype, tolerance, chunk_tokens):
    hidden_ND, weight_VD, bias_V, labels_N = problem(dtype)

    loss = linear_cross_entropy(hidden_ND, weight_VD, labels_N, bias_V, chunk_tokens=chunk_tokens)
    reference = plain(hidden_ND, weight_VD, labels_N, bias_V)

    torch.testing.assert_close(loss, reference, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(loss / 19, (hidden_ND, weight_VD, bias_V))
    theirs = torch.autograd.grad(reference / 19, (hidden_ND, weight_VD, bias_V))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_uniform_logits_cost_log_of_the_vocabulary():
    hidden_ND, weight_VD, labels_N = torch.zeros(3, WIDTH), torch.randn(WORDS, WIDTH), torch.tensor([0, 1, 2])

    loss = linear_cross_entropy(hidden_ND, weight_VD, labels_N)

    torch.testing.assert_close(loss, 3 * torch.tensor(float(WORDS)).log())


def test_a_label_whose_probability_underflows_has_an_exact_loss():
    hidden_ND, weight_VD = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [500.0]])

    loss = linear_cross_entropy(hidden_ND, weight_VD, torch.tensor([0]))

    assert loss.item() == 500.0


def test_bf16_gradients_are_as_close_as_those_of_autocast():
    hidden_ND, weight_VD, _, labels_N = problem()
    exact = torch.autograd.grad(plain(hidden_ND, weight_VD, labels_N), (hidden_ND, weight_VD))

    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens=6)
        theirs = plain(hidden_ND, weight_VD, labels_N)
    grads = torch.autograd.grad(ours, (hidden_ND, weight_VD))
    peers = torch.autograd.grad(theirs, (hidden_ND, weight_VD))

    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    for grad, peer, reference in zip(grads, peers, exact, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - reference).norm() <= 1.5 * (peer - reference).norm()


def test_bf16_operands_without_autocast():
    hidden_ND, weight_VD, bias_V, labels_N = problem(torch.bfloat16)

    loss = linear_cross_entropy(hidden_ND, weight_VD, labels_N, bias_V)
    loss.backward()

    assert loss.dtype == torch.float32
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain(hidden_ND, weight_VD, labels_N, bias_V).float(), rtol=2e-2, atol=0)


def test_a_frozen_bf16_embedding_is_read_in_fp32_without_autocast():
    hidden_ND, weight_VD, _, labels_N = problem()
    frozen_VD = weight_VD.detach().bfloat16()

    loss = linear_cross_entropy(hidden_ND, frozen_VD, labels_N)
    loss.backward()

    torch.testing.assert_close(loss, plain(hidden_ND, frozen_VD.float(), labels_N))
    assert frozen_VD.grad is None


def test_nothing_to_train_costs_nothing():
    hidden_ND, weight_VD, bias_V, labels_N = problem()

    loss = linear_cross_entropy(hidden_ND, weight_VD, torch.full_like(labels_N, -100), bias_V)
    loss.backward()

    assert loss.item() == 0.0
    for leaf in (hidden_ND, weight_VD, bias_V):
        torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf))


def test_a_tied_embedding_gets_both_gradients():
    _, weight_VD, _, labels_N = problem()
    words_N = torch.arange(TOKENS) % 5
    untied = [weight_VD.detach().clone().requires_grad_() for _ in range(2)]

    linear_cross_entropy(F.embedding(words_N, weight_VD), weight_VD, labels_N).backward()
    plain(F.embedding(words_N, untied[0]), untied[1], labels_N).backward()

    assert untied[0].grad is not None
    torch.testing.assert_close(weight_VD.grad, untied[0].grad + untied[1].grad, rtol=1e-5, atol=1e-5)


def test_accumulated_micro_batches_are_one_batch():
    hidden_ND, weight_VD, _, labels_N = problem()
    (whole_VD,) = torch.autograd.grad(linear_cross_entropy(hidden_ND, weight_VD, labels_N), weight_VD)

    for part in (slice(0, 9), slice(9, TOKENS)):
        linear_cross_entropy(hidden_ND[part], weight_VD, labels_N[part]).backward()

    torch.testing.assert_close(weight_VD.grad, whole_VD, rtol=1e-5, atol=1e-5)


def test_the_graph_is_used_once():
    hidden_ND, weight_VD, _, labels_N = problem()
    loss = linear_cross_entropy(hidden_ND, weight_VD, labels_N)
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_logits_that_are_there_as_a_whole_give_the_same():
    hidden_ND, weight_VD, bias_V, labels_N = problem()
    leaves = (hidden_ND, weight_VD, bias_V)
    logits_NV = F.linear(*leaves)
    kept_NV = logits_NV.detach().clone()

    loss, reference = logits_cross_entropy(logits_NV, labels_N), plain(hidden_ND, weight_VD, labels_N, bias_V)

    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(reference, leaves))
    assert torch.equal(logits_NV, kept_NV), "the model's logits are not its gradient's room"
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(logits_cross_entropy(logits_NV, labels_N), reference)


@pytest.mark.parametrize("chunk_tokens", [4, 512])
def test_losses_of_single_tokens(chunk_tokens):
    hidden_ND, weight_VD, bias_V, labels_N = problem()

    nll_N = token_nll(hidden_ND, weight_VD, labels_N, bias_V, chunk_tokens=chunk_tokens)

    reference_N = F.cross_entropy(F.linear(hidden_ND, weight_VD, bias_V), labels_N, reduction="none")
    torch.testing.assert_close(nll_N, reference_N.detach())
    assert not nll_N.requires_grad


def test_evaluation_and_training_agree():
    hidden_ND, weight_VD, bias_V, labels_N = problem()

    with torch.no_grad():
        unrecorded = linear_cross_entropy(hidden_ND, weight_VD, labels_N, bias_V)

    trained = linear_cross_entropy(hidden_ND, weight_VD, labels_N, bias_V).detach()
    torch.testing.assert_close(unrecorded, trained)
