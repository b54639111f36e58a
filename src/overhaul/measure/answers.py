"""Exact match of what a model answers to questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from overhaul.method import Measure, Positive
from overhaul.records import TABLE_SUFFIXES

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.table import Table

ROOM = 2
"""A model may write so many times as many tokens as the longest answer has."""


class Answers(Measure):
    """Share of questions that are answered exactly, greedily and as plain text, with a 95% interval."""

    needs_corpus: ClassVar[bool] = False
    reads_logits_alone: ClassVar[bool] = True

    task: tuple[str, ...] = Field(description="One or more tables with the columns question and answer.")
    limit: Positive | None = Field(200, description="Questions of each table, drawn by --seed; none means all.")
    tokens: Positive | None = Field(
        None, description="Of an answer, at most; none means twice those of the longest right answer."
    )
    batch_size: Positive = Field(16, description="Questions answered at once.")

    @field_validator("task")
    @classmethod
    def _there(cls, task: tuple[str, ...]) -> tuple[str, ...]:
        if not task:
            raise ValueError(f"name at least one table\nallowed: files ending in {', '.join(TABLE_SUFFIXES)}")
        for name in task:
            if not Path(name).is_file():
                raise ValueError(f"{name} is no file\nallowed: files ending in {', '.join(TABLE_SUFFIXES)}")
        return task

    def measure(self, model: nn.Module, data: Data) -> Table:
        """Share of answers whose result is the right one: a row `exact match/FILE` per table."""
        from overhaul.answers import is_right
        from overhaul.documents import read_columns
        from overhaul.evaluate import wilson_interval
        from overhaul.generation import continuations
        from overhaul.questions import drawn
        from overhaul.table import Row, Table

        rows, details, stems = [], [], [Path(name).stem for name in self.task]
        for name in self.task:
            pairs = read_columns(name, ("question", "answer"))
            asked = drawn(pairs, self.limit, seed=data.seed, text=lambda pair: pair[0])
            prompts = [f"{question}\n" for question, _ in asked]
            written = continuations(
                model,
                data.tokenizer,
                prompts,
                tokens=self._tokens(model, data, name, prompts, [answer for _, answer in asked]),
                one_line=not any("\n" in answer for _, answer in asked),
                batch_size=self.batch_size,
                dtype=data.dtype,
                title=Path(name).name,
            )
            hits = [is_right(text, answer) for text, (_, answer) in zip(written, asked, strict=True)]
            low, high = wilson_interval(sum(hits), len(hits))
            told = {"value": sum(hits) / len(hits), "low": low, "high": high, "count": len(hits)}
            called = name if stems.count(Path(name).stem) > 1 else Path(name).stem
            rows.append(Row(model=data.model, metric=f"exact match/{called}", **told))
            details += [
                {"model": data.model, "question": question, "wanted": answer, "answer": text, "right": hit}
                for (question, answer), text, hit in zip(asked, written, hits, strict=True)
            ]
        return Table(tuple(rows), details=tuple(details))

    def _tokens(self, model: nn.Module, data: Data, name: str, prompts: list[str], answers: list[str]) -> int:
        """How many an answer may have; `UserError` where the model cannot read a question and so many more."""
        from overhaul.errors import UserError
        from overhaul.generation import longest, read

        lengths = [max(len(read(data.tokenizer, text)) for text in texts) for texts in (prompts, answers)]
        tokens = self.tokens or ROOM * lengths[1]
        if lengths[0] + tokens > longest(model):
            raise UserError(
                f"{data.model} reads {longest(model)} tokens; a question of {name} and its answer take "
                f"{lengths[0] + tokens}",
                allowed="shorter questions, or a model that reads more",
                hint=f"--tokens {longest(model) - lengths[0]}" if longest(model) > lengths[0] else "",
            )
        return tokens
