"""Letting a model write many texts at once, and reading off what it makes of texts.

Letters of shapes: B texts, T tokens, D width.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria
from transformers.cache_utils import Cache, DynamicLayer

from overhaul import machine
from overhaul.interop import hf
from overhaul.progress import Bar

SHARED = 16
"""Tokens that all prompts begin with from which on they are read once: to read fewer anew costs less than a copy."""


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
    seed: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    one_line: bool = False,
    until: Sequence[str] = (),
    finished: bool = False,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    title: str = "",
) -> list[str]:
    """What the model goes on with after each prompt: greedy, or sampled when a seed is given.

    What all prompts begin with, such as answered questions, is read once where the model keeps what it read.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: the texts to continue, as they are.
        tokens: most new tokens.
        seed: of the samples; the caller's random generator is left as it was.
        temperature: divides the logits of a sample.
        top_p: of a sample, the likeliest tokens of this share together are drawn from.
        one_line: end with the first line break.
        until: end with the first of these, which may still stand in the text and be followed by more.
        finished: of a text that did not come to its end within `tokens`, nothing.
        batch_size: texts that are written at once.
        dtype: of matrix products.
        title: of the progress bar; there is none without a title.

    Returns:
        The new text of each, without special tokens and, of one line, without what follows it. What the model's own
        `generation_config` asks for, such as a penalty on repeated words, has no part in it.
    """
    inner: Any = model
    device = next(model.parameters()).device
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if one_line:
        ends += _line_breaks(tokenizer)
    how: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": seed is not None, "eos_token_id": ends}
    if seed is not None:
        # top_k of 0: transformers would otherwise draw from the 50 likeliest only.
        how |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    ids = [read(tokenizer, prompt) for prompt in prompts]
    # Texts of like length share a batch, so that little is padded.
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    written = [""] * len(prompts)
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, machine.autocast(device, dtype), _nothing_inherited(model):
        if seed is not None:
            torch.manual_seed(seed)
        shared, cache = _read_once(model, ids)
        with Bar(title, len(batches), quiet=not title) as bar:
            for batch in batches:
                ids_BT, mask_BT = _padded([ids[index] for index in batch], shared, _padding(tokenizer))
                made = inner.generate(
                    input_ids=ids_BT.to(device),
                    attention_mask=mask_BT.to(device),
                    pad_token_id=_padding(tokenizer),
                    past_key_values=_for_each(cache, len(batch)),
                    stopping_criteria=[_Until(tokenizer, until, ids_BT.shape[1])] if until else None,
                    **how,
                )
                new_BT = made[:, ids_BT.shape[1] :]
                has_end_B = torch.isin(new_BT, torch.tensor(ends, dtype=torch.long, device=device)).any(1).tolist()
                texts = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
                for index, text, has_end in zip(batch, texts, has_end_B, strict=True):
                    if has_end or not finished:
                        written[index] = text.split("\n")[0] if one_line else text
                bar.step()
    return written


@torch.no_grad()
def mean_states(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    tokens: int | None = None,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """The mean of each text's last hidden states, or of those of its first `tokens`, of norm 1: `(N, D)` fp32."""
    device = next(model.parameters()).device
    means = []
    with machine.autocast(device, dtype):
        for start in range(0, len(texts), batch_size):
            ids = [torch.tensor(read(tokenizer, text)[:tokens]) for text in texts[start : start + batch_size]]
            means.append(hf.mean_states(model, ids).cpu())
    return torch.nn.functional.normalize(torch.cat(means), dim=1).numpy()


def read(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as a model reads it, with what the tokenizer opens every text with; never none."""
    return tokenizer(text, verbose=False)["input_ids"] or [_padding(tokenizer)]


def longest(model: nn.Module) -> int:
    """How many tokens the model reads at once."""
    inner: Any = model
    return longest_of(inner.config)


def longest_of(config: Any) -> int:
    """How many tokens a model of this configuration reads at once."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


@contextmanager
def _nothing_inherited(model: nn.Module) -> Iterator[None]:
    """Inside, the model generates as it is told to: transformers fills what is not said from `generation_config`."""
    from transformers import GenerationConfig

    inner: Any = model
    kept, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = kept


class _Until(StoppingCriteria):
    """Ends a text in which one of some words stands, of those that were written from a place on."""

    def __init__(self, tokenizer: Any, words: Sequence[str], begins: int) -> None:
        self.tokenizer, self.words, self.begins = tokenizer, words, begins

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.begins :], skip_special_tokens=True)
        return torch.tensor([any(word in text for word in self.words) for text in texts], device=input_ids.device)


def _read_once(model: nn.Module, ids: Sequence[Sequence[int]]) -> tuple[int, Cache | None]:
    """How many tokens all prompts begin with, and what the model keeps of them; none where it would not be the same.

    A last token of each is left: what follows it has to be asked for.
    """
    inner: Any = model
    places = zip(*(one[:-1] for one in ids), strict=False)
    beginning = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, places)]
    # Where `generate` is replaced, as by banks that are chosen by the text, it is to see whole texts.
    if len(ids) < 2 or len(beginning) < SHARED or "generate" in vars(model):
        return 0, None
    device = next(model.parameters()).device
    less = {"logits_to_keep": 1} if inner._supports_logits_to_keep() else {}
    found = inner(input_ids=torch.tensor([beginning], device=device), use_cache=True, **less)
    cache = getattr(found, "past_key_values", None)
    # A window that slides, or a recurrent state, is not continued the same after tokens that are masked out.
    plain = isinstance(cache, Cache) and cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers)
    return (len(beginning), cache) if plain else (0, None)


def _for_each(cache: Cache | None, count: int) -> Cache | None:
    """A cache of as many texts that begin alike: it grows with them, and the one given does not."""
    if cache is None:
        return None
    made = copy.deepcopy(cache)
    made.batch_repeat_interleave(count)
    return made


def _padded(ids: Sequence[Sequence[int]], shared: int, filler: int) -> tuple[Tensor, Tensor]:
    """Tokens and their mask `(B, T)`: filled up behind what all begin with, as what is written follows on the right."""
    width = max(map(len, ids))
    gaps = [width - len(one) for one in ids]
    ids_BT = torch.tensor([[*one[:shared], *[filler] * gap, *one[shared:]] for one, gap in zip(ids, gaps, strict=True)])
    mask_BT = torch.ones_like(ids_BT)
    for row, gap in enumerate(gaps):
        mask_BT[row, shared : shared + gap] = 0
    return ids_BT, mask_BT


def _padding(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return found if found is not None else 0


def _line_breaks(tokenizer: Any) -> list[int]:
    """The tokens with a line break in them."""
    return list(_line_breaks_of(tokenizer, len(tokenizer)))


@lru_cache(maxsize=4)
def _line_breaks_of(tokenizer: Any, size: int) -> tuple[int, ...]:
    texts = tokenizer.batch_decode([[number] for number in range(size)])
    return tuple(number for number, text in enumerate(texts) if "\n" in text)
