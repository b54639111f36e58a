"""Documents packed into one window, with positions that begin anew: each as if it were alone."""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from overhaul.distillation import Distill, HiddenStates
from overhaul.interop import hf
from overhaul.interop.fused import fused
from overhaul.objective import CrossEntropy, Forward, Objective, weighted_mean
from overhaul.stream import IGNORED, Batch, Encoded, Pack, Rows
from tiny_models import MakeTiny

SIZES = (9, 1, 70, 16)
"""Tokens of the documents of a window: with one of a single token, and one longer than a chunk of fused attention."""


def documents(count: int = 2 * len(SIZES)) -> list[Encoded]:
    """Random tokens, all trained on."""
    draw = np.random.default_rng(0)
    sizes = [SIZES[number % len(SIZES)] for number in range(count)]
    return [Encoded(draw.integers(2, 500, size), np.ones(size, bool)) for size in sizes]


def packed() -> dict[str, Tensor]:
    """Two windows of four whole documents each."""
    source = Rows(documents(), name="documents", fingerprint="")
    return next(Batch(Pack(source, seq_len=sum(SIZES), document_mask=True), batch_size=2))


def load(make_tiny: MakeTiny, architecture: str = "llama", **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_tiny(architecture=architecture), **how)


def alone(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of each document in a pass of its own, without positions, put together again."""
    rows = [
        torch.cat([model(input_ids=part[None]).logits[0] for part in ids_T.split(SIZES)])
        for ids_T in batch["input_ids"]
    ]
    return torch.stack(rows)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As training reaches them."""
    head = hf.head(model)
    assert head is not None
    hidden_BTD = Forward(model, batch).hidden()
    return torch.nn.functional.linear(hidden_BTD.to(head.weight.dtype), head.weight, head.bias)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_logits_of_a_packed_window_are_those_of_each_document_alone(
    make_tiny: MakeTiny, architecture: str, attention: str
):
    model, batch = load(make_tiny, architecture, attn_implementation=attention), packed()
    whole = {name: tensor for name, tensor in batch.items() if name != "position_ids"}

    with torch.no_grad():
        wanted = alone(model, batch)
        torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=1e-5)
        with fused(model):
            torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=1e-5)
        assert (logits(model, whole) - wanted)[:, SIZES[0] :].abs().max() > 0.05


def test_fused_attention_in_bf16_keeps_documents_apart_too(make_tiny: MakeTiny):
    """There `fused` has a kernel of its own for windows without a mask: not for these."""
    model, batch = load(make_tiny, dtype=torch.bfloat16), packed()

    with torch.no_grad():
        own = logits(model, batch)
        with fused(model):
            inside = logits(model, batch)
            without = logits(model, {"input_ids": batch["input_ids"]})
        wanted = alone(model, batch)

    torch.testing.assert_close(inside, own, rtol=0.05, atol=0.02)
    torch.testing.assert_close(inside, wanted, rtol=0.05, atol=0.02)
    assert (without - own).abs().max() > 0.1


def loss(model: Any, objective: Objective, *batches: dict[str, Tensor]) -> Tensor:
    """Over all batches: the mean over all trained tokens."""
    counts = [objective.counts(batch) for batch in batches]
    whole = {name: sum(count[name] for count in counts) for name in counts[0]}
    return sum((weighted_mean(objective(Forward(model, batch), batch), whole) for batch in batches), torch.zeros(()))


@pytest.mark.parametrize("kind", ["cross-entropy", "divergence", "states"])
def test_loss_and_gradients_of_packed_windows_are_the_token_weighted_mean_of_the_documents_alone(
    make_tiny: MakeTiny, kind: str
):
    model = load(make_tiny)
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    if kind == "states":
        model.add_module("state_map", torch.nn.Linear(64, 64, bias=False))
    objective = {
        "cross-entropy": CrossEntropy(),
        "divergence": Distill(teacher, swap=True),
        "states": HiddenStates(teacher, ((0, 0), (1, 1))),
    }[kind]
    singles = [
        {"input_ids": torch.from_numpy(one.ids)[None], "labels": torch.from_numpy(one.ids)[None]}
        for one in documents()
        if len(one.ids) > 1  # one token alone predicts nothing
    ]

    values, gradients = [], []
    for batches in ([packed()], singles):
        with fused(model):
            value = loss(model, objective, *batches)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, [*model.parameters()], allow_unused=True))

    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    for own, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)
    assert sum(objective.counts(packed()).values()) == 2 * (sum(SIZES) - len(SIZES))


def test_a_single_token_document_has_nothing_that_is_trained_on():
    (labels_T, _) = packed()["labels"]

    assert labels_T[SIZES[0]] == IGNORED
    assert labels_T[SIZES[0] + 1] == IGNORED


@pytest.mark.parametrize(("architecture", "apart"), [("llama", True), ("gpt2", True), ("opt", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whether_a_model_keeps_documents_apart_is_tried_out(
    make_tiny: MakeTiny, architecture: str, apart: bool, dtype: torch.dtype
):
    """OPT takes positions and heeds them in its embedding alone."""
    assert hf.keeps_documents_apart(load(make_tiny, architecture, dtype=dtype)) is apart


def test_a_model_with_a_memory_beside_attention_does_not_keep_documents_apart():
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100}
    mamba = AutoModelForCausalLM.from_config(MambaConfig(state_size=4, **sizes)).eval()

    assert not hf.keeps_documents_apart(mamba)


def test_a_model_with_logits_of_its_own_kind_is_tried_out_on_them():
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 100}
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes, **heads)).eval()
    model.config.logit_scale = 0.5

    assert hf.keeps_documents_apart(model)


def test_windows_of_one_document_are_the_models_own(make_tiny: MakeTiny):
    """Positions that never begin anew change nothing, to the bit."""
    model = load(make_tiny)
    source = Rows([Encoded(np.arange(2, 66), np.ones(64, bool))] * 2, name="long", fingerprint="")
    (window,) = islice(Pack(source, seq_len=64, document_mask=True), 1)

    with torch.no_grad():
        own = logits(model, {"input_ids": window["input_ids"][None]})
        assert torch.equal(logits(model, {name: tensor[None] for name, tensor in window.items()}), own)
