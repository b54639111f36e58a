"""Accuracy of a classifier of texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from overhaul.kinds import Kind
from overhaul.method import Measure, Positive, SeqLen
from overhaul.records import TABLE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from overhaul.data import Data
    from overhaul.labelled_texts import LabelledTexts
    from overhaul.table import Table


class MeasureAccuracy(Measure):
    """Share of labelled texts whose class a classifier tells, with a 95% interval."""

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.TEXT_CLASSIFIER,)
    needs_corpus: ClassVar[bool] = False

    task: tuple[str, ...] = Field(description="One or more tables of labelled texts.")
    label_field: str = Field("label", description="Column of the label.")
    text_field: str = Field("text", description="Column of the text beside it.")
    limit: Positive | None = Field(None, description="Texts of each table, drawn by --seed; none means all.")
    seq_len: SeqLen = Field(512, description="Tokens of a text that are read, or as many as the model reads.")

    @field_validator("task")
    @classmethod
    def _named(cls, task: tuple[str, ...]) -> tuple[str, ...]:
        if not task:
            raise ValueError(f"name at least one table\nallowed: files ending in {', '.join(TABLE_SUFFIXES)}")
        if missing := next((name for name in task if not Path(name).exists()), None):
            raise ValueError(f"{missing} does not exist\nallowed: files ending in {', '.join(TABLE_SUFFIXES)}")
        return task

    def measure(self, model: nn.Module, data: Data) -> Table:
        """Share of texts whose class has the highest logit: a row `accuracy/FILE` per table."""
        from overhaul.evaluate import wilson_interval
        from overhaul.generation import longest
        from overhaul.interop.classifier import classes_of
        from overhaul.table import Row, Table
        from overhaul.task_data import encoded
        from overhaul.task_scores import logits_of

        rows, details, known, stems = [], [], classes_of(model), [Path(name).stem for name in self.task]
        for name in self.task:
            part = self._read(name, known, data)
            examples = encoded(part, data.tokenizer, min(self.seq_len, longest(model)))
            told = logits_of(model, examples, dtype=data.dtype).argmax(dim=1).tolist()
            hits = [place == label for place, label in zip(told, part.labels_N.tolist(), strict=True)]
            low, high = wilson_interval(sum(hits), len(hits))
            called = name if stems.count(Path(name).stem) > 1 else Path(name).stem
            share = {"value": sum(hits) / len(hits), "low": low, "high": high, "count": len(hits)}
            rows.append(Row(model=data.model, metric=f"accuracy/{called}", **share))
            details += [
                {"model": data.model, "text": text, "wanted": known[label], "answer": known[place], "right": hit}
                for text, label, place, hit in zip(part.texts, part.labels_N, told, hits, strict=True)
            ]
        return Table(tuple(rows), details=tuple(details))

    def _read(self, name: str, known: Sequence[str], data: Data) -> LabelledTexts:
        """The texts of a table; `UserError` where one has a label that is none of the model's classes."""
        import numpy as np

        from overhaul.errors import UserError, did_you_mean
        from overhaul.labelled_texts import LabelledTexts, read_labelled
        from overhaul.progress import say
        from overhaul.questions import drawn

        pairs, notes = read_labelled(name, label=self.label_field, text=self.text_field)
        for note in notes:
            say(f"note: {name}: {note}")
        if other := sorted({label for _, label in pairs} - {*known}):
            raise UserError(
                f"{name} has labels that are none of the classes of {data.model}, such as {other[0]!r}",
                allowed=", ".join(known),
                hint=did_you_mean(other[0], known),
            )
        asked = drawn(pairs, self.limit, seed=data.seed, text=lambda pair: pair[0])
        labels_N = np.array([known.index(label) for _, label in asked], np.int64)
        return LabelledTexts(texts=tuple(text for text, _ in asked), labels_N=labels_N)
