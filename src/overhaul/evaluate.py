"""Log-likelihoods, and what is made of them: perplexity, multiple choice, generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overhaul import machine
from overhaul.cross_entropy import token_nll
from overhaul.interop import hf
from overhaul.stream import IGNORED


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval, over `count` units."""

    value: float
    low: float
    high: float
    count: int


@torch.no_grad()
def negative_log_likelihoods(
    model: nn.Module, input_ids_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor | None = None
) -> Tensor:
    """Each next token's negative log-likelihood in nats.

    Args:
        model: a causal language model.
        input_ids_BT: tokens.
        labels_BT: tokens to score, `IGNORED` elsewhere; aligned with the inputs, position 0 is never scored.
        mask_BT: 1 for tokens, 0 for padding.

    Returns:
        `(B, T - 1)` fp32 on the CPU; 0 where a label is ignored.
    """
    device = next(model.parameters()).device
    batch = {"input_ids": input_ids_BT.to(device)} | ({} if mask_BT is None else {"attention_mask": mask_BT.to(device)})
    labels_BL = labels_BT[:, 1:].to(device)
    head = hf.head(model)
    if head is None:
        inner: Any = model
        logits_BLV = inner(**batch, use_cache=False).logits[:, :-1].float()
        scores = torch.nn.functional.cross_entropy(
            logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="none", ignore_index=IGNORED
        )
    else:
        hidden_BLD = hf.hidden_states(model, batch)[:, :-1]
        scores = token_nll(hidden_BLD.flatten(0, 1), head.weight, labels_BL.flatten(), head.bias)
    return scores.view(labels_BL.shape).float().cpu()


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(mean negative log-likelihood) over windows, with how fast the windows were scored."""

    estimate: Estimate
    tokens_per_second: float


def perplexity(
    model: nn.Module,
    windows_NT: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 2,
    seed: int = 0,
) -> Perplexity:
    """Perplexity over non-overlapping windows, as is usual for WikiText-2; the first token of a window is not scored.

    The interval is a bootstrap over windows, which are the independent units here, tokens are not.
    """
    model.eval()
    device = next(model.parameters()).device
    sums, began = [], time.perf_counter()
    with machine.autocast(device, dtype):
        for ids_BT in windows_NT.split(batch_size):
            sums.append(negative_log_likelihoods(model, ids_BT, ids_BT).double().sum(1))
    seconds = time.perf_counter() - began
    nll_N = torch.cat(sums).numpy() / (windows_NT.shape[1] - 1)
    low, high = bootstrap_interval(nll_N, seed=seed)
    count = windows_NT.shape[0] * (windows_NT.shape[1] - 1)
    estimate = Estimate(*(float(np.exp(x)) for x in (nll_N.mean(), low, high)), count=count)
    return Perplexity(estimate, windows_NT.numel() / seconds)


def bootstrap_interval(
    values_N: np.ndarray, *, seed: int = 0, draws: int = 2000, share: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values_N`."""
    picks = np.random.default_rng(seed).integers(0, len(values_N), (draws, len(values_N)))
    low, high = np.quantile(values_N[picks].mean(1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice question: the text before the options, the options, and which one is right."""

    prompt: str
    options: tuple[str, ...]
    answer: int


def choice_accuracy(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    seed: int = 0,
) -> Estimate:
    """Share of questions whose right option has the highest log-likelihood per character of the option's text.

    Length normalisation by characters, as `acc_norm` of lm-eval has it.
    """
    rows, owners = [], []
    for number, question in enumerate(questions):
        prompt = tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
        for option in question.options:
            whole = tokenizer(question.prompt + option, add_special_tokens=False)["input_ids"]
            # The boundary is taken at the prompt's own length, as lm-eval does; trailing spaces belong to the option.
            rows.append((whole, min(len(prompt), len(whole) - 1)))
            owners.append(number)
    scores = _option_scores(model, rows, dtype=dtype, batch_size=batch_size)
    right = np.zeros(len(questions))
    position = 0
    for number, question in enumerate(questions):
        own = scores[position : position + len(question.options)]
        lengths = np.array([max(len(option.strip()), 1) for option in question.options])
        right[number] = int(np.argmax(own / lengths)) == question.answer
        position += len(question.options)
    low, high = bootstrap_interval(right, seed=seed)
    return Estimate(float(right.mean()), low, high, len(questions))


def _option_scores(
    model: nn.Module, rows: list[tuple[list[int], int]], *, dtype: torch.dtype, batch_size: int
) -> np.ndarray:
    """Log-likelihood of each row's tokens after its boundary; rows of like length share a batch."""
    model.eval()
    device = next(model.parameters()).device
    scores = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    with machine.autocast(device, dtype):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            longest = max(len(rows[index][0]) for index in picked)
            ids_BT = torch.zeros(len(picked), longest, dtype=torch.int64)
            labels_BT = torch.full_like(ids_BT, IGNORED)
            mask_BT = torch.zeros_like(ids_BT)
            for place, index in enumerate(picked):
                ids, boundary = rows[index]
                ids_BT[place, : len(ids)] = torch.tensor(ids)
                labels_BT[place, boundary : len(ids)] = torch.tensor(ids[boundary:])
                mask_BT[place, : len(ids)] = 1
            nll_BL = negative_log_likelihoods(model, ids_BT, labels_BT, mask_BT)
            scores[picked] = -nll_BL.double().sum(1).numpy()
    return scores


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 64,
    chat: bool = False,
    seed: int | None = None,
) -> str:
    """The continuation of `prompt`: greedy, or sampled when a seed is given; `chat` applies the chat template."""
    device = next(model.parameters()).device
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(device)
    if seed is not None:
        torch.manual_seed(seed)
    inner: Any = model
    output = inner.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=seed is not None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
