"""Multiple choice by length-normalised log-likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from overhaul.errors import UserError
from overhaul.method import Measure, Positive
from overhaul.questions import TASKS, find_task, questions

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.table import Table


class Choice(Measure):
    """Accuracy on multiple-choice questions, with a 95% interval."""

    needs_corpus: ClassVar[bool] = False
    reads_logits_alone: ClassVar[bool] = True

    task: tuple[str, ...] = Field(("openbookqa",), description=f"One or more of {', '.join(TASKS)}.")
    limit: Positive | None = Field(200, description="Questions of each task, drawn by --seed; none means all.")
    batch_size: Positive = Field(16, description="Texts scored at once.")

    @field_validator("task")
    @classmethod
    def _known(cls, task: tuple[str, ...]) -> tuple[str, ...]:
        if not task:
            raise ValueError(f"name at least one task\nallowed: {', '.join(TASKS)}")
        try:
            for name in task:
                find_task(name)
        except UserError as error:  # pydantic collects nothing but ValueErrors
            raise ValueError(str(error)) from None
        return task

    def measure(self, model: nn.Module, data: Data) -> Table:
        """Share of questions whose right option is the likeliest: a row `accuracy/TASK` per task."""
        from dataclasses import asdict

        from overhaul import evaluate
        from overhaul.table import Row, Table

        rows = []
        for task in self.task:
            found = evaluate.choice_accuracy(
                model,
                data.tokenizer,
                questions(task, limit=self.limit, seed=data.seed),
                per_character=TASKS[task].per_character,
                dtype=data.dtype,
                batch_size=self.batch_size,
                title=task,
            )
            rows.append(Row(model=data.model, metric=f"accuracy/{task}", **asdict(found)))
        return Table(tuple(rows))
