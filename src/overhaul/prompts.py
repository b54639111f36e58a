"""A model that writes prompts after a few examples, in rounds."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from overhaul.bundle import Example
from overhaul.errors import UserError
from overhaul.generation import continuations, read
from overhaul.synthetic import Frame, Sieve, request

ROUND = 64
"""Prompts that are asked for at once."""
FEWEST = 16
"""Tokens that a written prompt may have at least."""
TOO_LONG = 2
"""A prompt so many times as long as the longest of the data is none of the task."""
Purpose = Literal["bundle", "transfer"]
"""What is written for: with the same seed, a transfer must not draw again what its judge has learnt to refuse."""


class Writer:
    """Prompts of a task by a model that has seen the examples only; never one of these, and none twice.

    Attributes:
        sieve: how many were written, and why some were dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        seeds: Sequence[Example],
        frame: Frame,
        *,
        longest: int,
        purpose: Purpose,
        seed: int,
        temperature: float,
        top_p: float,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.tokenizer, self.frame, self.drawn_from = model, tokenizer, frame, f"{purpose}/{seed}"
        self.examples = [example.prompt for example in seeds]
        self.sieve = Sieve(self.examples, frame, TOO_LONG * longest)
        self.how: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "dtype": dtype, "one_line": True}
        self.tokens = tokens_for(tokenizer, self.examples, frame)

    def rounds(self, budget: int, title: str = "") -> Iterator[list[str]]:
        """What passes the sieve, round by round, until so many were written."""
        order = random.Random(_number(self.drawn_from))
        for number in itertools.count():
            count = min(ROUND, budget - self.sieve.seen)
            if count <= 0:
                return
            asked = [request(self.examples, self.frame, order) for _ in range(count)]
            # Each round has its own numbers: the same ones would write the same prompts.
            seed = _number(f"{self.drawn_from}/{number}")
            made = continuations(
                self.model, self.tokenizer, asked, tokens=self.tokens, seed=seed, title=title, **self.how
            )
            yield [prompt for line in made if (prompt := self.sieve(line)) is not None]

    def several(self, wanted: int, *, budget: int, title: str = "") -> list[str]:
        """So many prompts, or what there is when the budget ends."""
        found: list[str] = []
        for made in self.rounds(budget, title):
            found += made
            if len(found) >= wanted:
                break
        return found[:wanted]


def _number(name: str) -> int:
    """A seed from a name: names that differ in anything draw other numbers."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


def tokens_for(tokenizer: Any, prompts: Sequence[str], frame: Frame) -> int:
    """How many tokens a prompt may take: those of the longest example, with room."""
    return max(FEWEST, TOO_LONG * max(len(read(tokenizer, frame.inside(prompt))) for prompt in prompts))


def refuse_short_context(
    most: int, tokenizer: Any, seeds: Sequence[Example], frame: Frame, name: str, *, hint: str
) -> None:
    """Raises `UserError` for a model that cannot read the examples and write another one.

    Args:
        most: tokens that it reads at once.
        tokenizer: its own.
        seeds: the examples.
        frame: of the prompts.
        name: what to call it.
        hint: what to type instead.
    """
    examples = [example.prompt for example in seeds]
    needed = len(read(tokenizer, request(examples, frame, random.Random(0)))) + tokens_for(tokenizer, examples, frame)
    if needed > most:
        raise UserError(
            f"{name} reads {most} tokens, and the examples with a new prompt take {needed}",
            allowed="a model that reads more",
            hint=hint,
        )
