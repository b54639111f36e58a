"""What a model still says of texts that it was to forget (Shi et al.: MUSE, ICLR 2025).

    verbatim memory     mean ROUGE-L F1 of what it goes on with after the beginning of a text, and how the text goes on
    knowledge           mean ROUGE-L F1 of its answers to questions, after some that are answered in the prompt
    membership          log-probabilities of every token, from which `overhaul.membership` tells what it was trained on

Texts are written many at once, filled up on the left, and scored many at once, filled up on the right: what is written
and scored is the same as one at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from overhaul import disk, machine
from overhaul.errors import UserError
from overhaul.evaluate import next_token_nll
from overhaul.fetch import cache_directory
from overhaul.generation import continuations, longest, read
from overhaul.membership import scores
from overhaul.progress import Bar

Floats = NDArray[np.float64]
Pair = tuple[str, str]
"""A question and its answer."""

ENDS = ("\n\n", "\nQuestion", "Question:")
"""Where an answer ends: what follows belongs to the next question."""
GRAM = 13
"""Words in a row that two texts have by chance never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a model is asked about.

    Attributes:
        forget, retain, holdout: texts that it was to forget, that it still knows, and that it never saw; all of one
            kind.
        forget_questions, retain_questions: about the first two.
        shots: answered questions about neither, which stand before each question.
    """

    forget: tuple[str, ...]
    retain: tuple[str, ...]
    holdout: tuple[str, ...]
    forget_questions: tuple[Pair, ...]
    retain_questions: tuple[Pair, ...]
    shots: tuple[Pair, ...]

    def splits(self) -> dict[str, tuple[str, ...]]:
        """The three kinds of text by name."""
        return {"forget": self.forget, "retain": self.retain, "holdout": self.holdout}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How it is asked.

    Attributes:
        prompt_tokens: the first ones of a text, which the model is given.
        tokens: that it goes on with, and that this is compared with.
        answer_tokens: of an answer, at most.
        batch_size: texts at once.
    """

    prompt_tokens: int
    tokens: int
    answer_tokens: int
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What one model said.

    Attributes:
        verbatim: ROUGE-L F1 in percent of each text to forget.
        forgotten, retained: ROUGE-L F1 in percent of each answer to the questions.
        scores: by kind of text, then by score, a number for each text.
    """

    verbatim: tuple[float, ...]
    forgotten: tuple[float, ...]
    retained: tuple[float, ...]
    scores: Mapping[str, Mapping[str, tuple[float, ...]]]

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Findings:
        """Back from what `dataclasses.asdict` gives."""
        scored = {kind: {name: tuple(of) for name, of in by.items()} for kind, by in told["scores"].items()}
        return cls(**{name: tuple(told[name]) for name in ("verbatim", "forgotten", "retained")}, scores=scored)


def examine(
    model: nn.Module, tokenizer: Any, material: Material, how: Asking, *, dtype: torch.dtype, title: str = ""
) -> Findings:
    """Asks a model all of it.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its own.
        material: what about.
        how: how.
        dtype: of matrix products.
        title: of the progress bars; there are none without a title.
    """
    lowered = {kind: tuple(text.lower() for text in texts) for kind, texts in material.splits().items()}
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for kind, texts in material.splits().items():
        own, low = (
            log_probabilities(
                model, tokenizer, of, dtype=dtype, batch_size=how.batch_size, title=title and f"{title} {kind}"
            )
            for of in (texts, lowered[kind])
        )
        found[kind] = {
            name: tuple(score(*of) for of in zip(own, low, texts, strict=True)) for name, score in scores().items()
        }
    return Findings(
        verbatim=verbatim_memory(model, tokenizer, material.forget, how, dtype=dtype, title=title),
        forgotten=knowledge(model, tokenizer, material.forget_questions, material.shots, how, dtype=dtype, title=title),
        retained=knowledge(model, tokenizer, material.retain_questions, material.shots, how, dtype=dtype, title=title),
        scores=found,
    )


def verbatim_memory(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], how: Asking, *, dtype: torch.dtype, title: str = ""
) -> tuple[float, ...]:
    """Of each text ROUGE-L F1, in percent, between what follows its beginning and what the model goes on with.

    Args:
        model, tokenizer, how, dtype, title: as `examine`.
        texts: longer than the beginning that is given.

    Raises:
        UserError: one is not.
    """
    prompts, rests = [], []
    for number, text in enumerate(texts, 1):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= how.prompt_tokens:
            raise UserError(
                f"text {number} to forget has {len(ids)} tokens, and {how.prompt_tokens} of them would be given",
                hint=f"--prompt-tokens {max(1, len(ids) // 2)}",
            )
        prompts.append(tokenizer.decode(ids[: how.prompt_tokens]))
        rests.append(tokenizer.decode(ids[how.prompt_tokens : how.prompt_tokens + how.tokens]))
    written = continuations(
        model, tokenizer, prompts, tokens=how.tokens, batch_size=how.batch_size, dtype=dtype,
        title=title and f"{title} verbatim",
    )  # fmt: skip
    return rouge_l(written, rests)


def knowledge(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Pair],
    shots: Sequence[Pair],
    how: Asking,
    *,
    dtype: torch.dtype,
    title: str = "",
) -> tuple[float, ...]:
    """Of each question ROUGE-L F1, in percent, between its answer and the model's; arguments as `examine`."""
    before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shots)
    prompts = [f"{before}Question: {question}\nAnswer:" for question, _ in questions]
    most = max(len(read(tokenizer, prompt)) for prompt in prompts) + how.answer_tokens
    if most > longest(model):
        raise UserError(
            f"{len(shots)} answered questions and one more take {most} tokens, and the model reads {longest(model)}",
            hint="fewer or shorter --shots",
        )
    written = continuations(
        model, tokenizer, prompts, tokens=how.answer_tokens, until=ENDS, batch_size=how.batch_size, dtype=dtype,
        title=title and f"{title} questions",
    )  # fmt: skip
    return rouge_l([answer_of(text) for text in written], [answer for _, answer in questions])


def answer_of(written: str) -> str:
    """The answer at the beginning of what was written."""
    ends = [at for end in ENDS if (at := written.find(end)) >= 0]
    return written[: min(ends, default=len(written))].strip()


def rouge_l(written: Sequence[str], wanted: Sequence[str]) -> tuple[float, ...]:
    """ROUGE-L F1 in percent of each pair, without stemming.

    Raises:
        UserError: the package that computes it is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(
            "rouge-score is not installed, which compares texts", hint="pip install 'overhaul[muse]'"
        ) from error
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(written, wanted, strict=True)
    return tuple(100 * float(scorer.score(target, text)["rougeL"].fmeasure) for text, target in pairs)


@torch.no_grad()
def log_probabilities(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    dtype: torch.dtype,
    batch_size: int,
    title: str = "",
) -> list[Floats]:
    """Of each text the log-probabilities of its tokens after the first; what the model cannot read of it is left out.

    Args:
        model, tokenizer, dtype, title: as `examine`.
        texts: each with two tokens at least.
        batch_size: texts at once, those of like length together.

    Raises:
        UserError: a text has fewer.
    """
    ids = [read(tokenizer, text)[: longest(model)] for text in texts]
    if short := next((number for number, one in enumerate(ids) if len(one) < 2), None):
        raise UserError(f"{texts[short]!r} has one token, which nothing predicts", hint="longer texts")
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    found: list[Floats] = [np.zeros(0)] * len(ids)
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    with machine.autocast(next(model.parameters()).device, dtype), Bar(title, len(batches), quiet=not title) as bar:
        for batch in batches:
            rows = [torch.tensor(ids[number]) for number in batch]
            # Filled up on the right, where a causal model does not look.
            nll_BT = next_token_nll(model, nn.utils.rnn.pad_sequence(rows, batch_first=True))
            for number, row, nll_T in zip(batch, rows, nll_BT, strict=True):
                found[number] = -nll_T[: len(row) - 1].double().numpy()
            bar.step()
    return found


def refuse_overlap(forget: Sequence[str], holdout: Sequence[str]) -> None:
    """`UserError` where a held-out text is one of those to forget, or half of its runs of 13 words are in them."""
    known = {gram for text in forget for gram in _grams(text)}
    for number, text in enumerate(holdout, 1):
        own = set(_grams(text))
        if len(own & known) * 2 >= len(own):
            raise UserError(
                f"held-out text {number} is among the texts to forget, or half of it is: {text[:60]!r}",
                allowed="texts that no model here was trained on",
            )


def _grams(text: str) -> Iterable[tuple[str, ...]]:
    words = text.split()
    return (tuple(words[at : at + GRAM]) for at in range(max(1, len(words) - GRAM + 1)))


def kept(directory: Path, material: Material, how: Asking, dtype: torch.dtype) -> Path:
    """The directory where findings of a model are kept: any change of it, of what is asked or how, is another place."""
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.suffix in (".safetensors", ".sqlite", ".json")):
        digest.update(f"{file.relative_to(directory)} {disk.sha256(file)}\n".encode())
    digest.update(json.dumps([asdict(material), asdict(how), str(dtype)], sort_keys=True).encode())
    return cache_directory() / "muse" / digest.hexdigest()[:32]
