"""Learning task after task: what its methods share. A method says what a task is trained with, not how."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from overhaul.kinds import Kind
from overhaul.method import (
    BatchSize,
    Fraction,
    Names,
    Natural,
    PeakRate,
    Positive,
    Steps,
    Training,
)

if TYPE_CHECKING:
    from torch import nn

    from overhaul.artifact import Artifact
    from overhaul.learners.learner import Learner
    from overhaul.task_data import TaskData
    from overhaul.task_record import TaskCost
    from overhaul.tasks import TaskSequence
    from overhaul.text_tasks import TextSequence
    from overhaul.train import History, Plan


Readers = tuple[tuple[tuple[str, ...], bool, str], ...]
"""Settings, whether a term that was chosen reads them, and which one would."""
FISHER = ("fisher", "fisher_examples", "fisher_decay")
"""Settings of the Fisher information."""


class Learning(Training):
    """A training in tasks: each is a plan of its own, and the model is measured on all of them after each."""

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.IMAGE_CLASSIFIER,)

    _start: Path | None = PrivateAttr(None)

    tasks: Names = Field(
        (),
        description="Image sets, names or paths: each a task with classes of its own, or one to split or vary; of a "
        "language model corpora, or labelled texts.",
    )
    split: Positive | None = Field(None, description="Tasks that the classes of one set are divided into.")
    variants: Names = Field(
        (),
        description="Of one set, tasks: plain, invert, rotate=DEGREES, permute=SEED, domain=NAME; or domains.",
    )
    order: Natural | None = Field(None, description="Seed of the order of classes or tasks; none: as they stand.")
    first_tasks: Positive | None = Field(
        None, description="Tasks of the sequence that are learnt, as to choose settings; none: all."
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of each task's training examples that is measured, and not trained on, in place of the "
        "held-out ones.",
    )
    augment: Literal["none", "auto", "noise", "grey", "colour"] = Field(
        "none",
        description="How training images are changed, each anew whenever it comes, from the memory too: noise; grey "
        "adds shifts, turns and light; colour mirrors and colours too; auto is noise for grey images and colour for "
        "others.",
    )
    heldout: Positive = Field(
        64, description="Windows, or questions, that a task is measured on; of labelled texts those of each class."
    )
    steps: Steps = Field(200, description="Optimizer steps of each task.")
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Passes over each task's examples; replaces --steps when given."
    )
    batch_size: BatchSize = 32
    lr: PeakRate = 0.03
    warmup: Fraction = Field(0.0, description="Share of a task's steps with a linearly rising rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field("constant", description="Decay after the warm-up.")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="Update rule; it begins anew with each task.")  # pyright: ignore[reportIncompatibleVariableOverride]
    momentum: Fraction = Field(0.0, description="Of --optimizer sgd.")

    @model_validator(mode="after")
    def _measures_each_task(self) -> Self:
        if self.eval_every:
            raise ValueError("eval_every: tasks are measured when each is learnt, not between; leave it out")
        return self

    def readers(self) -> Readers:
        """Which of its own settings are of terms or parts that are not always there."""
        return ()

    @model_validator(mode="after")
    def _settings_are_read_by_a_term(self) -> Self:
        for names, is_read, reader in self.readers():
            for name in names:
                if not is_read and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is of {reader}; leave it out, or choose that")
        return self

    def in_stages(self) -> bool:
        return True

    def reads_data(self) -> bool:
        return False

    def references(self) -> tuple[str, ...]:
        return tuple(path for path in self.tasks if Path(path).exists())

    def at(self, path: Path) -> Self:
        method = self.model_copy()
        method._start = path
        return method

    @property
    def start(self) -> Path | None:
        """The directory that the model was read from."""
        return self._start

    def sequence(self) -> TaskSequence | TextSequence:
        """The tasks, read: corpora for a language model, else image sets.

        Raises:
            UserError: none is named, one cannot be read, or what is asked for does not fit it.
        """
        from overhaul.errors import UserError
        from overhaul.tasks import open_tasks

        if Kind.CAUSAL_LM in self.kinds and self._reads_text():
            return self._texts()
        for name in ("seq_len", "heldout"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(f"--{name.replace('_', '-')} is of text, and these tasks are images", hint="without it")
        return self._shortened(open_tasks(self.tasks, split=self.split, variants=self.variants, order=self.order))

    def _shortened(self, found: TaskSequence | TextSequence) -> TaskSequence | TextSequence:
        """The first tasks, and what is measured while settings are chosen, where that was asked for."""
        found = found.first(self.first_tasks) if self.first_tasks else found
        return found.validating(self.validation) if self.validation else found

    def _reads_text(self) -> bool:
        """Whether the model is a language model, by its directory."""
        return self._kind() is Kind.CAUSAL_LM

    def _kind(self) -> Kind | None:
        """What the model does, by its directory."""
        from overhaul import artifact

        return None if self._start is None else artifact.kind_at(self._start)

    def _texts(self) -> TaskSequence | TextSequence:
        import numpy as np

        from overhaul.errors import UserError
        from overhaul.text_tasks import open_texts

        for name in ("split", "variants"):
            if getattr(self, name):
                raise UserError(f"{name} is of image sets, and this is a language model", hint="a corpus for each task")
        self._refuse_augmenting()
        found = open_texts(self.tasks)
        if self.order is not None:
            found = found.ordered(np.random.default_rng(self.order).permutation(len(found.tasks)).tolist())
        return self._shortened(found)

    def _refuse_augmenting(self) -> None:
        """What texts do not have."""
        from overhaul.errors import UserError

        if self.augment != "none":
            raise UserError(f"--augment {self.augment} is of images, and these tasks are texts", hint="without it")

    def measures(self) -> tuple[str, ...]:
        from overhaul.task_record import CLASS_IL, TASK_IL

        return tuple(f"accuracy, {kind}" for kind in (CLASS_IL, TASK_IL))

    @abstractmethod
    def learner(self, model: nn.Module, data: TaskData) -> Learner:
        """What this method keeps of the tasks, which are still before it."""

    def plan(self, model: nn.Module, data: Any) -> Plan:
        """That of the first task."""
        return next(self.stages(model, data))

    def stages(self, model: nn.Module, data: Any) -> Iterator[Plan]:
        """A plan for each task; what the model knows of all tasks is measured after each."""
        import torch

        from overhaul.errors import UserError
        from overhaul.sharding import num_processes
        from overhaul.task_scores import Scores, note_scores

        if num_processes() > 1:
            raise UserError("tasks are learnt on one process", hint="without accelerate launch")
        scores, learner = Scores(data), self.learner(model, data)
        costs: list[TaskCost] = []
        # Convolutions and pooling are faster so, forwards and backwards.
        whole: Any = model
        whole.to(memory_format=torch.channels_last)
        for number, task in enumerate(data.sequence.tasks):
            learner.begin(number)
            if number == 0 and learner.answers_beforehand:
                scores.take(learner.right, 0)
            done: list[History] = []
            for plan in learner.plans(number):
                yield replace(plan, told=done.append)
            began = time.perf_counter()
            learner.learnt(number)
            noted = time.perf_counter() - began
            costs.append(_cost(task.name, done[-1], noted, learner))
            scores.take(learner.right, number + 1, ahead=learner.answers_beforehand)
        learner.end()
        whole.to(memory_format=torch.contiguous_format)
        note_scores(scores, costs)

    def steps_of(self, data: TaskData, number: int) -> int:
        """Optimizer steps of a task."""
        if self.epochs is None:
            return self.steps
        return data.steps(number, passes=self.epochs, batch_size=self.batch_size * self.accumulate)


def _cost(name: str, done: History, noted: float, learner: Learner) -> TaskCost:
    """What a task took.

    Args:
        name: of it.
        done: its training, the part before a run was stopped and resumed too.
        noted: seconds that the learner took afterwards.
        learner: after it.
    """
    from overhaul.task_record import TaskCost

    return TaskCost(
        name=name,
        steps=len(done.points),
        images=done.tokens,
        unit=done.unit,
        seconds=round(done.seconds + noted, 3),
        trained_parameters=done.trainable_parameters,
        kept_bytes=dict(learner.kept_bytes()),
    )


class SharedLearning(Learning):
    """All tasks in one set of weights, with one head."""

    classifier: Literal["whole", "growing"] = Field(
        "whole",
        description="Whether the head has a row for every class of the tasks at once, or gets those of a task with it. "
        "Classes that the model knows by name keep their rows.",
    )
    train: Names = Field(
        ("all",),
        description="Which parameters beside the head: all, qkv (queries, keys and values), or patterns of names "
        "such as '*.layer.3.*'.",
    )
    label_by: Literal["field", "corpus"] = Field(
        "field", description="What tells the class of a text: a column of a table, or the corpus that it is a piece of."
    )
    label_field: str | None = Field(
        None,
        description="Column of the label, where tasks are tables of labelled texts: a language model gets a head. A "
        "classifier of texts reads label by itself.",
    )
    text_field: str = Field("text", description="Column of the text beside it.")
    class_texts: Positive | None = Field(
        None, description="Labelled texts of a class that are trained on, at most, chosen by content; none: all."
    )

    @model_validator(mode="after")
    def _labels_are_of_one_kind(self) -> Self:
        if self.label_by == "corpus" and self.label_field is not None:
            raise ValueError("label_field is of tables, and label_by corpus takes a corpus as a class; leave one out")
        if self.label_by == "corpus" and self.text_field != "text":
            raise ValueError("text_field is of tables, and label_by corpus takes a corpus as a class; leave it out")
        return self

    def _is_labelled(self) -> bool:
        """Whether the tasks are texts with labels."""
        asked = self.label_by == "corpus" or self.label_field is not None
        return asked or self._kind() is Kind.TEXT_CLASSIFIER

    def sequence(self) -> TaskSequence | TextSequence:
        """The tasks, read: labelled texts where labels are told or the model classifies texts.

        Raises:
            UserError: none is named, one cannot be read, or what is asked for does not fit it.
        """
        from overhaul.errors import UserError

        if self._is_labelled():
            return self._labelled()
        for name in ("text_field", "class_texts"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(
                    f"--{name.replace('_', '-')} is of labelled texts", hint="--label-field, or --label-by corpus"
                )
        return super().sequence()

    def _labelled(self) -> TaskSequence | TextSequence:
        from overhaul.errors import UserError, refuse_twice
        from overhaul.labelled_texts import open_classes, open_labelled
        from overhaul.tasks import tasks_of_texts

        if self._kind() is Kind.IMAGE_CLASSIFIER:
            raise UserError("labels of texts are told, and this is an image classifier", hint="a language model")
        if self.variants:
            raise UserError("variants is of image sets, and these are texts", hint="without it")
        self._refuse_augmenting()
        if not self.tasks:
            raise UserError("no texts are named", hint="--tasks topics.jsonl")
        refuse_twice(self.tasks, "each once")
        how: dict[str, Any] = {"limit": self.class_texts, "heldout": self.heldout}
        if self.label_by == "corpus":
            # A word has a token and a half, or two: most pieces are as long as what is read.
            sets = open_classes(self.tasks, words=max(1, self.seq_len // 2), **how)
        else:
            column = self.label_field or "label"
            sets = [open_labelled(path, label=column, text=self.text_field, **how) for path in self.tasks]
        return self._shortened(tasks_of_texts(sets, name=" ".join(self.tasks), split=self.split, order=self.order))

    def opened(self, made: Artifact) -> Artifact:
        """A language model that is to tell classes gets a head; texts can be filled up to one length."""
        from overhaul.interop.classifier import can_pad, with_head

        if made.kind is Kind.IMAGE_CLASSIFIER or not self._is_labelled():
            return made
        if made.kind is Kind.CAUSAL_LM:
            made = replace(made, model=with_head(made.model))
        can_pad(made.model, made.processor)
        return made
