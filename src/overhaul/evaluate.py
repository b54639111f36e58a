"""Log-likelihoods, and what is made of them: perplexity, multiple choice, generation."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overhaul import machine
from overhaul.cross_entropy import token_nll
from overhaul.interop import hf
from overhaul.progress import Bar
from overhaul.questions import Question
from overhaul.stream import IGNORED, Encoded, padded


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval, over `count` units."""

    value: float
    low: float
    high: float
    count: int


@torch.no_grad()
def nll_at(model: nn.Module, input_ids_BT: Tensor, rows_K: Tensor, places_K: Tensor, labels_K: Tensor) -> Tensor:
    """Negative log-likelihoods in nats of K tokens, each following one place of one row.

    Rows may be filled up on the right with any token: a causal model does not look there.

    Args:
        model: a causal language model.
        input_ids_BT: tokens.
        rows_K, places_K: where each token is predicted, `0 <= row < B`, `0 <= place < T`.
        labels_K: the tokens.

    Returns:
        `(K,)` fp32 on the CPU.
    """
    ids_BT = input_ids_BT.to(next(model.parameters()).device)
    rows_K, places_K, labels_K = (indices_K.to(ids_BT.device) for indices_K in (rows_K, places_K, labels_K))
    head = hf.head(model)
    if head is None:
        inner: Any = model
        logits_KV = inner(input_ids=ids_BT, use_cache=False).logits[rows_K, places_K].float()
        nll_K = torch.nn.functional.cross_entropy(logits_KV, labels_K, reduction="none")
    else:
        hidden_KD = hf.hidden_states(model, {"input_ids": ids_BT})[rows_K, places_K]
        nll_K = token_nll(hidden_KD, head.weight, labels_K, head.bias)
    return nll_K.float().cpu()


def next_token_nll(model: nn.Module, input_ids_BT: Tensor) -> Tensor:
    """Each token's negative log-likelihood in nats after those before it: `(B, T - 1)`, fp32 on the CPU."""
    batch, length = input_ids_BT.shape
    rows_K = torch.arange(batch).repeat_interleave(length - 1)
    places_K = torch.arange(length - 1).repeat(batch)
    return nll_at(model, input_ids_BT, rows_K, places_K, input_ids_BT[:, 1:].flatten()).view(batch, length - 1)


def document_nll(model: nn.Module, documents: Sequence[Encoded]) -> np.ndarray:
    """Mean negative log-likelihood of each document's trained tokens after its first, padded on the right.

    Args:
        model: a causal language model, in evaluation mode.
        documents: at least one token after the first is trained on in each.

    Returns:
        `(B,)` nats a token, fp64.
    """
    width = max(len(document.ids) for document in documents)
    windows = [padded(document, width) for document in documents]
    ids_BT, labels_BT = (torch.stack([window[name] for window in windows]) for name in ("input_ids", "labels"))
    rows_K, places_K = (labels_BT[:, 1:] != IGNORED).nonzero(as_tuple=True)
    nll_K = nll_at(model, ids_BT, rows_K, places_K, labels_BT[rows_K, places_K + 1]).double()
    sums_B = torch.zeros(len(documents), dtype=torch.float64).index_add_(0, rows_K, nll_K)
    return (sums_B / torch.bincount(rows_K, minlength=len(documents))).numpy()


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(mean negative log-likelihood) over windows, with how fast the windows were scored.

    The speed is that of the median batch: the first one warms up, and now and then another process gets in between.
    """

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
    sums, speeds = [], []
    with machine.autocast(device, dtype):
        for ids_BT in windows_NT.split(batch_size):
            began = perf_counter()
            sums.append(next_token_nll(model, ids_BT).double().sum(1))
            speeds.append(ids_BT.numel() / (perf_counter() - began))
    nll_N = torch.cat(sums).numpy() / (windows_NT.shape[1] - 1)
    low, high = bootstrap_interval(nll_N, seed=seed)
    count = windows_NT.shape[0] * (windows_NT.shape[1] - 1)
    estimate = Estimate(*(float(np.exp(x)) for x in (nll_N.mean(), low, high)), count=count)
    return Perplexity(estimate, statistics.median(speeds))


@dataclass(frozen=True, slots=True)
class WindowLosses:
    """Sums of negative log-likelihoods in nats, and how many tokens they are over, one each a window."""

    sums_N: np.ndarray
    counts_N: np.ndarray


@torch.no_grad()
def window_losses(
    model: nn.Module,
    windows_NT: Tensor,
    labels_NT: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 2,
) -> WindowLosses:
    """Losses of the tokens that `labels_NT` does not ignore; the first token of a window is not scored."""
    model.eval()
    sums = []
    kept_NT = (labels_NT[:, 1:] != IGNORED).double()
    with machine.autocast(next(model.parameters()).device, dtype):
        for ids_BT, kept_BT in zip(windows_NT.split(batch_size), kept_NT.split(batch_size), strict=True):
            sums.append((next_token_nll(model, ids_BT).double() * kept_BT).sum(1))
    return WindowLosses(torch.cat(sums).numpy(), kept_NT.sum(1).numpy())


def mean_loss(losses: WindowLosses, less: WindowLosses | None = None) -> Estimate:
    """Nats a token, or the difference of two models' over the same windows, whose interval is far narrower."""
    sums_N = losses.sums_N - (less.sums_N if less else 0.0)
    low, high = bootstrap_ratio(sums_N, losses.counts_N)
    count = int(losses.counts_N.sum())
    return Estimate(float(sums_N.sum()) / count, low, high, count)


def bootstrap_ratio(
    sums_N: np.ndarray, counts_N: np.ndarray, *, seed: int = 0, draws: int = 2000, share: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum of sums over sum of counts, over windows."""
    picks = np.random.default_rng(seed).integers(0, len(sums_N), (draws, len(sums_N)))
    ratios = sums_N[picks].sum(1) / np.maximum(counts_N[picks].sum(1), 1)
    low, high = np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values_N: np.ndarray, *, seed: int = 0, draws: int = 2000, share: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values_N`."""
    return bootstrap_ratio(values_N, np.ones(len(values_N)), seed=seed, draws=draws, share=share)


def mean_over_runs(values: Sequence[float], *, share: float = 0.95) -> Estimate:
    """Mean of a few independent runs, with Student's interval; of one run the value alone."""
    from scipy import stats

    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, mean, mean, 1)
    half = float(stats.t.ppf((1 + share) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def choice_accuracy(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    per_character: bool = True,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    title: str = "",
) -> Estimate:
    """Share of questions whose right option is the likeliest, with Wilson's interval.

    Options are compared per character of their text, without the space before it, as `acc_norm` of lm-eval has
    it, or by their whole log-likelihood, as `acc` has it; of equals the first counts. Arguments are those of
    `option_log_likelihoods`.
    """
    scores = option_log_likelihoods(model, tokenizer, questions, dtype=dtype, batch_size=batch_size, title=title)
    right = 0
    for question, score_O in zip(questions, scores, strict=True):
        length_O = [len(option.strip()) if per_character else 1 for option in question.options]
        right += int(np.argmax(score_O / length_O)) == question.answer
    low, high = wilson_interval(right, len(questions))
    return Estimate(right / len(questions), low, high, len(questions))


def wilson_interval(hits: int, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927): it has a width also where nothing or everything is a hit."""
    share, spread = hits / count, z * z / count
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def option_log_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    title: str = "",
) -> list[np.ndarray]:
    """Log-likelihood in nats of every option after its question's prompt.

    Options that differ in their last token only, as yes and no do, are read off one pass.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with the special tokens it adds by itself.
        questions: what to score.
        dtype: of matrix products.
        batch_size: contexts per pass.
        title: of the progress bar; there is none without a title.

    Returns:
        For each question an array with one number per option.
    """
    model.eval()
    device = next(model.parameters()).device
    contexts: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    options = _option_tokens(model, tokenizer, questions)
    for number, (ids, scored) in enumerate(options):
        contexts.setdefault(tuple(ids[:-1]), []).append((number, ids[-scored:]))
    # Contexts of like length share a batch; the longest come first, so that memory runs out at once or never.
    ordered = sorted(contexts, key=len, reverse=True)
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    scores = torch.zeros(len(options), dtype=torch.float64)
    with machine.autocast(device, dtype), Bar(title, len(batches), quiet=not title) as bar:
        for batch in batches:
            ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True)
            asked = [
                (number, row, place, token)
                for row, context in enumerate(batch)
                for number, tokens in contexts[context]
                for place, token in enumerate(tokens, len(context) - len(tokens))
            ]
            number_K, rows_K, places_K, labels_K = torch.tensor(asked).T
            scores.index_add_(0, number_K, -nll_at(model, ids_BT, rows_K, places_K, labels_K).double())
            bar.step()
    return [part.numpy() for part in scores.split([len(question.options) for question in questions])]


def _option_tokens(model: nn.Module, tokenizer: Any, questions: Sequence[Question]) -> list[tuple[list[int], int]]:
    """Every option with its prompt as tokens, and how many of the last ones are the option's.

    The option begins where the tokens of the prompt alone end, spaces after the prompt being the option's. What is
    longer than the model reads loses its beginning. All as in lm-eval.
    """
    inner: Any = model
    longest = getattr(inner.config, "max_position_embeddings", None) or sys.maxsize
    pairs = [(question.prompt, option) for question in questions for option in question.options]
    prompts = tokenizer([prompt.rstrip() for prompt, _ in pairs], verbose=False)["input_ids"]
    wholes = tokenizer([prompt + option for prompt, option in pairs], verbose=False)["input_ids"]
    return [
        # An option whose first letters merge into the prompt's last token is scored by its own last token at least.
        (whole[-longest - 1 :], max(len(whole) - len(prompt), 1))
        for prompt, whole in zip(prompts, wholes, strict=True)
    ]


class _Clock:
    """A streamer of transformers that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _token: Tensor) -> None:
        """Called with the prompt, then with every token."""
        self.times.append(perf_counter())

    def end(self) -> None:
        """Called after the last token."""

    @property
    def seconds_per_token(self) -> list[float]:
        """Of every token but the first, which waits for the prompt to be read."""
        return [after - before for before, after in itertools.pairwise(self.times[1:])]


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model went on with, and the seconds that each token after the first took."""

    text: str
    seconds_per_token: tuple[float, ...]


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
    return timed_generation(model, tokenizer, prompt, tokens=tokens, chat=chat, seed=seed).text


@torch.no_grad()
def timed_generation(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 64,
    chat: bool = False,
    seed: int | None = None,
) -> Generation:
    """As `generate`, with the time of every decoding step: one text at a time, its keys and values cached."""
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
    clock = _Clock()
    output = inner.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=seed is not None,
        streamer=clock,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Generation(text, tuple(clock.seconds_per_token))
