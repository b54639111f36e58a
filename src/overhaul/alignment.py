"""Which examples teach a chat format and nothing else: those whose answers the model knows without one.

An instruction is read in two forms, as plain text and in the chat template; the loss of its answer in each tells
whether the answer is known, and what the template does to it.

Letters of shapes: N examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from torch import nn

from overhaul import machine
from overhaul.data import Data
from overhaul.documents import SHAPES, Message, Row, row_text
from overhaul.errors import UserError
from overhaul.evaluate import document_nll
from overhaul.on_disk import RowsOnDisk
from overhaul.progress import Bar
from overhaul.stream import Encoded
from overhaul.watch import Watcher

By = Literal["fas", "loss", "random"]
TEMPLATE = "chat_template.jinja"
"""Where transformers looks for a model's chat template before it looks elsewhere."""
BATCH_TOKENS = 4096
"""Of one pass, padding included."""
LEAST_LOSS = 1e-6
"""In nats a token: losses below it count as this much, so that answers known for certain can be compared."""


@dataclass(frozen=True, slots=True)
class Example:
    """An instruction with its answer.

    Attributes:
        row: as a conversation, which is what is trained on.
        plain: as a text; of its tokens those of the answer are marked.
        templated: in the chat template, marked alike.
    """

    row: Row
    plain: Encoded
    templated: Encoded


def as_conversation(row: Row) -> Row | None:
    """The row as turns of a conversation that ends with an answer; None where there is no question or no answer.

    Of a preference the chosen answer is taken. Spaces where a prompt and its completion meet belong to neither turn.
    """
    if tuple(row) == ("text",):
        return None
    if "messages" in row:
        turns = list(row["messages"])
        while turns and turns[-1].role != "assistant":
            turns.pop()
    else:
        (prompt, _), (answer, _) = row_text(row)
        turns = [Message("user", prompt.strip()), Message("assistant", answer.strip())]
    asks = any(turn.role == "user" and turn.content.strip() for turn in turns[:-1])
    return Row((("messages", tuple(turns)),)) if asks and turns[-1].content.strip() else None


def dpo_pairs(row: Row) -> tuple[str, str, str]:
    """A preference as plain data: the prompt, the answer that is preferred, the one that is not.

    The form for the paper's third stage, direct preference optimization, which is not here yet.

    Raises:
        UserError: the row is no preference, or one of its answers is blank.
    """
    if tuple(row) != ("prompt", "chosen", "rejected"):
        raise UserError(f"a row with {', '.join(row)} is no preference", allowed="prompt, chosen and rejected")
    for name in ("chosen", "rejected"):
        if not row[name].strip():
            raise UserError(f"the preference {row['prompt']!r:.60} has no {name} answer", allowed="text in both")
    return row["prompt"], row["chosen"], row["rejected"]


def use_template(data: Data, file: str | None) -> str | None:
    """Gives the tokenizer the chat template of a file, or makes sure that it has one.

    Args:
        data: its tokenizer is changed, in place.
        file: a jinja template over `messages`, `add_generation_prompt` and the special tokens; None keeps the model's.

    Returns:
        The text of the file, None without one.

    Raises:
        UserError: there is no template, or it does not write a question and its answer.
    """
    if file is None:
        if not data.tokenizer.chat_template:
            raise UserError(
                f"{data.model or 'the model'} has no chat template, so there is no format to learn",
                allowed="a jinja template over messages, as tokenizers have it",
                hint="--template FILE.jinja",
            )
        return None
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--template {file} cannot be read: {error}", hint="a text file with a jinja template"
        ) from error
    turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        written = data.tokenizer.apply_chat_template(turns, chat_template=text, tokenize=False)
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"--template {file} is no chat template: {error}", allowed="a jinja template over messages"
        ) from error
    if "ANSWER" not in written.partition("QUESTION")[2]:
        raise UserError(
            f"--template {file} makes {written!r:.60} of a question and its answer",
            allowed="a jinja template that writes the content of all messages, in order",
        )
    data.tokenizer.chat_template = text
    return text


def example(data: Data, row: Row, *, with_end: bool = False) -> Example | None:
    """The row in both forms; None where it is no question with an answer.

    Args:
        data: of it the tokenizer, with a chat template.
        row: of any shape; of a conversation the last answer is marked.
        with_end: mark what the template closes the answer with too.

    Raises:
        UserError: the template does not write the answer as it is.
    """
    conversation = as_conversation(row)
    if conversation is None:
        return None
    *before, (last, _) = data.segments(conversation)
    content = conversation["messages"][-1].content
    start = _start_of_answer(data, conversation, last)
    said = next((form for form in (content, content.strip()) if last.startswith(form, start)), None)
    if said is None:
        raise UserError(
            f"the chat template writes {last!r:.60} for the answer {content!r:.40}",
            allowed="a template that writes answers as they are",
        )
    end = start + len(said)
    templated = [(text, False) for text, _ in before]
    templated += [(last[:start], False), (said, True), (last[end:], with_end)]
    found = Example(
        conversation,
        _encoded(data, _as_text(row, conversation), opening=data.opening),
        _encoded(data, templated, opening=()),
    )
    return found if all(form.trained[1:].any() for form in (found.plain, found.templated)) else None


def _start_of_answer(data: Data, conversation: Row, last: str) -> int:
    """Where in its rendered turn `last` the answer begins: there another answer makes it differ.

    To look for the answer's words would find them in the role's header, where an answer is as short as `a`.
    """
    *turns, answer = conversation["messages"]
    other = "N" if not answer.content.strip().startswith("N") else "Y"
    *_, (instead, _) = data.segments(Row((("messages", (*turns, Message(answer.role, other))),)))
    alike = (one == another for one, another in zip(last, instead, strict=False))
    return next((place for place, is_alike in enumerate(alike) if not is_alike), min(len(last), len(instead)))


def _as_text(row: Row, conversation: Row) -> list[tuple[str, bool]]:
    """Question and answer without a template, as `documents.as_plain_text` joins them."""
    if "messages" not in row:
        return row_text(row)
    *before, answer = conversation["messages"]
    return [("".join(f"{turn.content}\n" for turn in before), False), (answer.content, True)]


def _encoded(data: Data, pieces: Sequence[tuple[str, bool]], *, opening: Sequence[int]) -> Encoded:
    """Pieces as tokens, each encoded by itself, as `Data.encode` does."""
    kept = [(text, is_marked) for text, is_marked in pieces if text]
    found = data.tokenizer([text for text, _ in kept], add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*opening, *(token for part in found for token in part)]
    marked = [False] * len(opening)
    for part, (_, is_marked) in zip(found, kept, strict=True):
        marked += [is_marked] * len(part)
    return Encoded(np.array(ids, np.int64), np.array(marked, bool))


def candidates(data: Data, *, seq_len: int, limit: int, with_end: bool = False) -> tuple[Example, ...]:
    """Examples of the training rows, in their order; of more than `limit`, that many drawn by `data.seed`.

    Args:
        data: rows and a tokenizer with a chat template.
        seq_len: rows that are longer in the template are left out.
        limit: so many at most.
        with_end: see `example`.

    Raises:
        UserError: there are none.
    """
    train = data.corpus.train
    rows = train.at_hand() if isinstance(train, RowsOnDisk) else tuple(train)
    found: dict[int, Example] = {}
    asked, shortest = 0, 0
    for index in np.random.default_rng(data.seed).permutation(len(rows)).tolist():
        made = example(data, rows[index], with_end=with_end)
        if made is None:
            continue
        length = len(data.encode(made.row).ids)
        asked, shortest = asked + 1, min(shortest or length, length)
        if length <= seq_len:
            found[index] = made
        if len(found) == limit:
            break
    if not asked:
        raise UserError(
            f"no row of {data.corpus.name} is a question with an answer",
            allowed=" | ".join("+".join(shape) for shape in SHAPES if shape != ("text",)),
        )
    if not found:
        raise UserError(
            f"every row of {data.corpus.name} is longer than --seq-len {seq_len} in the chat template",
            hint=f"--seq-len {shortest}",
        )
    return tuple(found[index] for index in sorted(found))


@torch.no_grad()
def mean_losses(
    model: nn.Module,
    texts: Sequence[Encoded],
    *,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = BATCH_TOKENS,
    title: str = "",
) -> np.ndarray:
    """The loss of the marked tokens of each text, in nats a token, without ever holding all logits.

    Args:
        model: a causal language model.
        texts: at least one token after the first is marked in each.
        dtype: of matrix products.
        batch_tokens: of one pass, padding included.
        title: of the progress bar; there is none without a title.

    Returns:
        `(N,)` fp64.
    """
    model.eval()
    means_N = np.zeros(len(texts))
    batches = list(_batches([len(text.ids) for text in texts], batch_tokens))
    with (
        machine.autocast(next(model.parameters()).device, dtype),
        Bar(title, len(batches), quiet=not title) as bar,
    ):
        for numbers in batches:
            means_N[numbers] = document_nll(model, [texts[number] for number in numbers])
            bar.step()
    return means_N


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of texts of like length, the longest first: memory runs out at once or never."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    yield batch


@dataclass(frozen=True, slots=True)
class Scores:
    """Of each example's answer, the loss in nats a token, `(N,)`.

    Attributes:
        plain_N: as a text.
        templated_N: in the chat template.
    """

    plain_N: np.ndarray
    templated_N: np.ndarray

    def ratios(self) -> np.ndarray:
        """FAS, L(answer | question, template) / L(answer | question), `(N,)`: 1 where the template changes nothing."""
        return np.maximum(self.templated_N, LEAST_LOSS) / np.maximum(self.plain_N, LEAST_LOSS)

    def table(self, chosen: np.ndarray) -> list[tuple[str, str, str]]:
        """Rows of a table of the chosen examples beside all: means, that of the ratio geometric."""
        said = [("examples", f"{len(chosen):,}", f"{len(self.plain_N):,}")]
        for what, values_N in (("loss as plain text", self.plain_N), ("loss in the template", self.templated_N)):
            said.append((f"{what}, nats a token", f"{values_N[chosen].mean():.3f}", f"{values_N.mean():.3f}"))
        log_N = np.log(self.ratios())
        return [*said, ("FAS", f"{math.exp(log_N[chosen].mean()):.3f}", f"{math.exp(log_N.mean()):.3f}")]


def score(model: nn.Module, examples: Sequence[Example], *, dtype: torch.dtype = torch.float32) -> Scores:
    """Both losses of each example."""
    plain_N = mean_losses(model, [one.plain for one in examples], dtype=dtype, title="scoring plain texts")
    templated_N = mean_losses(model, [one.templated for one in examples], dtype=dtype, title="scoring conversations")
    return Scores(plain_N, templated_N)


def choose(scores: Scores, count: int, *, by: By = "fas", pool: float = 0.5, seed: int = 0) -> np.ndarray:
    """Which examples are trained on.

    Args:
        scores: of N examples.
        count: how many to take; all of fewer.
        by: `fas` takes, of the share `pool` with the lowest plain loss, those whose FAS is nearest to 1 as a ratio (a
            half is as far as a double); `loss` the lowest plain loss; `random` any.
        pool: of all examples, for `fas`; never fewer than `count`.
        seed: of `random`.

    Returns:
        Numbers of examples, rising, int64. Of equals the one with the lower plain loss is taken, then the first.
    """
    if by == "random":
        return np.sort(np.random.default_rng(seed).permutation(len(scores.plain_N))[:count])
    easiest = np.argsort(scores.plain_N, kind="stable")
    if by == "fas":
        easiest = easiest[: max(count, math.ceil(pool * len(easiest)))]
        easiest = easiest[np.argsort(np.abs(np.log(scores.ratios()[easiest])), kind="stable")]
    return np.sort(easiest[:count])


class SameChoice(Watcher):
    """Refuses to resume a run on other examples than it began with."""

    def __init__(self, key: str) -> None:
        self.key = key

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": self.key}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["chosen"] != self.key:
            raise UserError(
                "other examples, or another chat template, would be trained on than before the interruption",
                hint="a new -o",
            )
