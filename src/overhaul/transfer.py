"""The parts of a transfer by synthetic prompts: they are written, judged, answered and measured, model by model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overhaul import artifact, authenticity
from overhaul.bundle import JUDGE, Bundle, Example, example_of
from overhaul.corpora import Corpus, CorpusSpec, open_corpus
from overhaul.discrepancy import Sums, mmd2
from overhaul.documents import Row, read_rows, row_text
from overhaul.errors import UserError
from overhaul.generation import continuations, mean_states, read
from overhaul.progress import say
from overhaul.prompts import Writer
from overhaul.split import fingerprint
from overhaul.synthetic import Sieve, distinct_share, likeness, longest_runs, plain

LEAST, MOST = 0.02, 0.98
"""Shares of accepted prompts outside of which a judge is of no use."""
ENOUGH = 256
"""Judged prompts after which a share below `LEAST` is no accident."""
LEAST_UNIQUE = 0.5

Told = tuple[tuple[str, str], ...]
"""What the report says: a quantity, and its value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """Prompts to learn from.

    Attributes:
        prompts: their texts.
        scores: of the judge, None where it was not asked.
        told: for the report.
        answers: their own, where the teacher is not to be asked.
    """

    prompts: tuple[str, ...]
    scores: tuple[float | None, ...]
    told: Told
    answers: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Teaching:
    """A bundle at work: its models are loaded when their turn comes, beside the target, and freed after it.

    Two at a time where the source writes what the judge reads, else one.

    Attributes:
        bundle: what there is of the task.
        tokenizer: the target's.
        dtype: of matrix products.
        seed: of what is drawn.
        like: a parameter of the target: models come to its device, in fp32 where it is.
    """

    bundle: Bundle
    tokenizer: Any
    dtype: torch.dtype
    seed: int
    like: Tensor

    def load(self, ref: str) -> artifact.Artifact:
        """A model of the bundle."""
        dtype = torch.float32 if self.like.dtype == torch.float32 else None
        return artifact.load(ref, dtype=dtype, device=self.like.device)

    def given(self, prompts: Sequence[str]) -> Synthetic:
        """Prompts that nobody has to judge."""
        return Synthetic(prompts=tuple(prompts), scores=(None,) * len(prompts), told=self._told(prompts))

    def real(self, corpus: Corpus, wanted: int) -> Synthetic:
        """Rows of the data with their own answers: what a transfer without it is measured against."""
        rows = [example_of(row, corpus.name) for row in islice(corpus.train, wanted)]
        made = self.given([row.prompt for row in rows])
        return Synthetic(
            prompts=made.prompts, scores=made.scores, told=made.told, answers=tuple(row.answer for row in rows)
        )

    def random_text(self, corpus: Corpus, wanted: int) -> Synthetic:
        """Pieces of any text, as long as the examples."""
        words = [word for row in corpus.train for text, _ in row_text(row) for word in text.split()]
        order = random.Random(self.seed)
        lengths = [max(len(seed.prompt.split()), 1) for seed in self.bundle.seeds]
        found = []
        for _ in range(wanted):
            length = min(order.choice(lengths), len(words))
            start = order.randrange(len(words) - length + 1)
            found.append(" ".join(words[start : start + length]))
        return self.given(found)

    def written(
        self,
        target: nn.Module | None,
        wanted: int,
        *,
        budget: int,
        threshold: float | None,
        temperature: float,
        top_p: float,
    ) -> Synthetic:
        """What the target writes after the examples, or the source where there is no target, above the threshold.

        Without a threshold all of it is kept, and judged for the record.

        Raises:
            UserError: the judge lets next to nothing through, or nothing was written.
        """
        source = None if target is not None else self.load(self.bundle.base.path)
        how: dict[str, Any] = {"budget": budget, "threshold": threshold, "temperature": temperature, "top_p": top_p}
        model, tokenizer = (source.model, source.processor) if source else (target, self.tokenizer)
        assert model is not None
        seen, scores, sieve = self._judged(model, tokenizer, wanted, **how)
        self._refuse_stall(seen, scores, threshold, sieve)
        kept = _accepted(scores, threshold)[:wanted]
        if len(kept) < wanted:
            say(f"warning: the budget of {budget} prompts ended with {len(kept)} of {wanted}")
        prompts = [seen[place] for place in kept]
        told = (
            *self._worth(seen, scores, sieve, threshold),
            *self._distance(source or self.load(self.bundle.base.path), seen, prompts, threshold),
            *self._told(prompts),
        )
        return Synthetic(prompts=tuple(prompts), scores=tuple(scores[place] for place in kept), told=told)

    def _judged(
        self,
        model: nn.Module,
        tokenizer: Any,
        wanted: int,
        *,
        budget: int,
        threshold: float | None,
        temperature: float,
        top_p: float,
    ) -> tuple[list[str], list[float], Sieve]:
        """What a model writes until enough of it is accepted, and the judge's scores of it."""
        judge = self.load(str(self.bundle.path / JUDGE))
        writer = Writer(
            model, tokenizer, self.bundle.seeds, self.bundle.frame, longest=self.bundle.statistics["longest_prompt"],
            purpose="transfer", seed=self.seed, temperature=temperature, top_p=top_p, dtype=self.dtype,
        )  # fmt: skip
        seen: list[str] = []
        scores: list[float] = []
        for made in writer.rounds(budget):
            seen += made
            if made:
                scores += authenticity.scores(judge.model, judge.processor, made, dtype=self.dtype).tolist()
            count = len(_accepted(scores, threshold))
            say(f"prompts: {writer.sieve.seen} written, {len(seen)} different, {count} of {wanted} kept")
            if count >= wanted or (len(scores) >= ENOUGH and count < LEAST * len(scores)):
                break
        return seen, scores, writer.sieve

    def answers(
        self, prompts: Sequence[str], test: Sequence[Example], *, own: Sequence[str] | None
    ) -> tuple[list[str], float]:
        """What the teacher says to the prompts, greedily, and its share of right answers in the test.

        Args:
            prompts: to be answered.
            test: prompts with answers; there is no share without any.
            own: the prompts' own answers, where the teacher is not to be asked.
        """
        teacher = self.load(self.bundle.teacher_path)
        said = own or continuations(
            teacher.model, teacher.processor, prompts, tokens=answer_tokens(teacher.processor, self.bundle),
            one_line=self.bundle.statistics["one_line_answers"], dtype=self.dtype, title="answers",
        )  # fmt: skip
        right = right_share(teacher.model, teacher.processor, test, self.bundle, self.dtype)
        return [answer.rstrip() for answer in said], right

    def _refuse_stall(self, seen: list[str], scores: list[float], threshold: float | None, sieve: Sieve) -> None:
        """Raises `UserError` where nothing was written, or where next to nothing of it looks real to the judge."""
        if not seen:
            raise UserError(
                f"none of {sieve.seen} written prompts can be used: {sieve.dropped}",
                hint="--generator source, or --temperature 1.2",
            )
        if sieve.unique_share < LEAST_UNIQUE:
            say(f"warning: of what was written {sieve.unique_share:.0%} is new, the rest repeats")
        if threshold is None:
            return
        share = float(np.mean(np.array(scores) > threshold))
        if share < LEAST:
            rejected = [(score, text) for score, text in zip(scores, seen, strict=True) if score <= threshold]
            nearest = [text for _, text in sorted(rejected, reverse=True)[:3]]
            raise UserError(
                f"the judge accepts {share:.1%} of {len(seen)} prompts, their mean score is {np.mean(scores):.3f}; "
                f"rejected are {'; '.join(map(repr, nearest))}",
                allowed=f"{LEAST:.0%} or more",
                hint="--generator source, a lower --threshold, or --prompts unfiltered",
            )
        if share > MOST:
            say(f"warning: the judge accepts {share:.1%} of the prompts: the filter does nothing")

    def _worth(self, seen: list[str], scores: list[float], sieve: Sieve, threshold: float | None) -> Told:
        share = float(np.mean(np.array(scores) > (self.bundle.judge["threshold"] if threshold is None else threshold)))
        return (
            ("written", str(sieve.seen)),
            ("of these unusable", ", ".join(f"{count} {why}" for why, count in sieve.dropped.items() if count) or "0"),
            ("new among the usable", f"{sieve.unique_share:.1%}"),
            ("accepted by the judge", f"{share:.1%} of {len(seen)}"),
            ("AUROC of the judge", f"{self.bundle.judge['auroc']:.3f}"),
        )

    def _distance(
        self, base: artifact.Artifact, seen: Sequence[str], kept: Sequence[str], threshold: float | None
    ) -> Told:
        """Discrepancy from the held-out prompts of the data, of all that was written and of what is kept."""

        def distance(prompts: Sequence[str]) -> str:
            if len(prompts) < 2 or self.bundle.real.count < 2:
                return "too few"
            states_ND = mean_states(base.model, base.processor, prompts, dtype=self.dtype)
            return f"{mmd2(Sums.of(self.bundle.features(states_ND)), self.bundle.real):.5f}"

        filtered = () if threshold is None else (("MMD^2 from held-out prompts, kept", distance(kept)),)
        return (("MMD^2 from held-out prompts, all written", distance(seen)), *filtered)

    def _told(self, prompts: Sequence[str]) -> Told:
        """How varied the prompts are, and how near to the examples."""
        frame = self.bundle.frame
        seeds = [frame.inside(seed.prompt) for seed in self.bundle.seeds]
        inside = [frame.inside(prompt) for prompt in prompts]
        words = [plain(seed).split() for seed in seeds]
        lengths = sorted(len(text.split()) for text in inside)
        low, middle, high = (lengths[min(int(share * len(lengths)), len(lengths) - 1)] for share in (0.1, 0.5, 0.9))
        return (
            ("kept", str(len(prompts))),
            ("words, tenth, half and nine tenths of the prompts", f"{low}, {middle}, {high}"),
            ("different pairs of words", f"{distinct_share(inside):.1%}"),
            ("longest run of words shared with an example", str(max(longest_runs(inside, words)))),
            ("likeness to the nearest example", f"{np.mean([likeness(text, seeds) for text in inside]):.1%}"),
        )


def _accepted(scores: Sequence[float], threshold: float | None) -> list[int]:
    """The places of the prompts above the threshold; all without one."""
    return [place for place, score in enumerate(scores) if threshold is None or score > threshold]


def right_share(model: nn.Module, tokenizer: Any, test: Sequence[Example], bundle: Bundle, dtype: torch.dtype) -> float:
    """Share of greedy answers that are the right ones, spaces around them aside; not a number without a test."""
    if not test:
        return float("nan")
    was_training = model.training
    model.eval()
    said = continuations(
        model, tokenizer, [row.prompt for row in test], tokens=answer_tokens(tokenizer, bundle),
        one_line=bundle.statistics["one_line_answers"], dtype=dtype,
    )  # fmt: skip
    model.train(was_training)
    return sum(text.strip() == row.answer.strip() for text, row in zip(said, test, strict=True)) / len(test)


def answer_tokens(tokenizer: Any, bundle: Bundle) -> int:
    """How many tokens an answer may take: the longest of the data, as densely as this tokenizer reads the examples."""
    dense = max(len(read(tokenizer, seed.answer)) / max(len(seed.answer), 1) for seed in bundle.seeds)
    return math.ceil(dense * bundle.statistics["longest_answer"]) + 1  # and its end


def rows_of(path: str) -> tuple[Example, ...]:
    """All rows of a file of prompts with answers.

    Raises:
        UserError: it cannot be read, or has other rows.
    """
    return tuple(example_of(row, path) for row in read_rows(path).rows)


def say_trained_on(path: str, bundle: Bundle) -> None:
    """A word of warning where a test holds what the adapter was trained on.

    Raises:
        UserError: the file cannot be read, or has other rows than prompts with answers.
    """
    seeds = {seed.prompt for seed in bundle.seeds}
    met = len(seeds & {row.prompt for row in rows_of(path)})
    try:
        is_data = open_corpus(CorpusSpec(path=path)).fingerprint == bundle.statistics["fingerprint"]
    except UserError:  # too few rows to be divided as the data was
        is_data = False
    if is_data:
        say(f"warning: --test {path} is the private data itself: what was trained on it is no measure of anything")
    elif met:
        say(f"warning: --test {path} has {met} of the bundle's {len(seeds)} examples, which are rows of the data")


def learnt(rows: Sequence[tuple[str, str, float | None]], bundle: Bundle) -> Corpus:
    """Prompts with the teacher's answers as a corpus of nothing but training rows."""
    train = tuple(Row((("prompt", prompt), ("completion", answer))) for prompt, answer, _ in rows)
    return Corpus(
        name="synthetic prompts", licence="", source=str(bundle.path), bytes=0, train=train, calib=(), heldout=(),
        notes=(), fingerprint=fingerprint((train,)),
    )  # fmt: skip
