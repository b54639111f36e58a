"""Making a model forget texts by training it: what the methods share; each says what it does to the texts alone."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from overhaul.method import TO_FORGET, TO_RETAIN, Fraction, Names, NonNegative, PeakRate, Positive, Settings, Training

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from overhaul.corpora import Corpus
    from overhaul.data import Data
    from overhaul.objective import Objective
    from overhaul.stream import Stream
    from overhaul.train import Plan
    from overhaul.unlearning.seen import Known
    from overhaul.unlearning.stopping import Knowledge, Stopping
    from overhaul.unlearning.texts import Windows

    Before = Callable[[], nn.Module]
    """Gives the model as it was, frozen."""

ONE_OR_SEVERAL = BeforeValidator(lambda given: (given,) if isinstance(given, int | float) else given)
Strengths = Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], ONE_OR_SEVERAL]
"""How far a method goes: one number, which may stand alone, or several that are tried."""


class Stop(Settings):
    """When little enough is known of texts to forget: the stopping rule of MUSE."""

    questions: str | None = Field(
        None, description="Table of question and answer about the texts to forget, asked after each pass over them."
    )
    shots: str | None = Field(None, description="Table of answered questions that stand before each; about others.")
    num_shots: Positive = Field(10, description="Of these, at most.")
    retrain: str | None = Field(
        None, description="Model that was trained without the texts: it is over when no more is known than there."
    )
    at: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        None, description="In place of such a model: percent (mean ROUGE-L F1) that may be known."
    )
    limit: Positive = Field(100, description="Questions, the first ones.")

    def files(self) -> tuple[str, ...]:
        """What is read."""
        return tuple(path for path in (self.questions, self.shots) if path)

    def refuse_half(self) -> None:
        """Raises `ValueError` for settings that make no rule together."""
        given = self.model_dump(exclude_defaults=True)
        if self.questions is None and given:
            raise ValueError(f"stop.{min(given)} needs stop.questions, a table of question and answer")
        if self.questions is not None and (self.retrain is None) == (self.at is None):
            raise ValueError("stop.questions needs stop.retrain MODEL or stop.at PERCENT, and one of them alone")
        if self.shots is None and "num_shots" in given:
            raise ValueError("stop.num_shots is of stop.shots, a table of answered questions")


class Removal(Training):
    """Unlearn texts; the forgetting is approximate, and `measure muse` says how far it went.

    The texts are read whole, nothing held out, and cut into windows as one stream.
    """

    brings_text: ClassVar[bool] = True

    forget: str | None = Field(None, min_length=1, description="Texts to forget: a corpus name, a file or a directory.")
    from_ledger: Names | None = Field(
        None,
        description="Corpora in the model's ledger: what it was trained on of them is forgotten; with --forget, of its "
        "texts those that the model was trained on there, or, where none is named, anywhere.",
    )
    lr: PeakRate = 1e-5
    warmup: Fraction = Field(0.0, description="Share of the steps with a linearly rising rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field("constant", description="Decay after the warm-up.")
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Passes over the texts to forget; replaces --steps when given."
    )
    stop: Stop = Field(Stop.model_validate({}), description="When it is over before its last step.")

    _path: Path | None = PrivateAttr(None)
    _found: Any = PrivateAttr(None)

    @model_validator(mode="after")
    def _something_is_forgotten(self) -> Self:
        if self.forget is None and not self.from_ledger:
            what = "from_ledger names no corpus" if self.from_ledger is not None else "nothing is to be forgotten"
            raise ValueError(f"{what}: use forget FILE, or from_ledger NAME of a corpus that the model was trained on")
        return self

    @model_validator(mode="after")
    def _stopping_is_a_rule(self) -> Self:
        self.stop.refuse_half()
        return self

    def others(self) -> tuple[str, ...]:
        return (self.stop.retrain,) if self.stop.retrain else ()

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses questions that cannot be read or compared."""
        from overhaul.sharding import refuse_sharded

        if self.stop.questions:
            assert data is not None
            refuse_sharded("--stop.questions")
            self.knowledge(data)

    def knowledge(self, data: Data) -> Knowledge:
        """Asks how much is known of the texts to forget."""
        from overhaul.unlearning.stopping import Knowledge

        return Knowledge(self.stop, data)

    def reads_data(self) -> bool:
        return False

    def references(self) -> tuple[str, ...]:
        return (*((self.forget,) if self.forget else ()), *self.stop.files())

    def at(self, path: Path) -> Self:
        """The same for the model in a directory, whose ledger may say what is forgotten."""
        placed = self.model_copy()
        placed._path = path
        return placed

    def to_forget(self) -> Corpus:
        """All of the texts to forget; raises `UserError` where they cannot be read, or the ledger has none of them."""
        from overhaul.corpora import open_all_of

        if self.from_ledger is None:
            assert self.forget is not None
            return open_all_of(self.forget, TO_FORGET)
        return self.from_the_ledger()[0]

    def from_the_ledger(self) -> tuple[Corpus, Known]:
        """The texts to forget that the model was trained on, and what its ledger says of them; read once."""
        from dataclasses import replace

        from overhaul.corpora import open_all_of
        from overhaul.errors import UserError
        from overhaul.progress import say
        from overhaul.unlearning import seen

        if self._path is None:
            raise UserError("from_ledger needs the directory of the model", hint="method.at(directory)")
        if self._found is None:
            names = self.from_ledger or ()
            if self.forget:
                corpus, known = seen.among(open_all_of(self.forget, TO_FORGET), self._path, names)
            else:
                corpus, known = seen.trained_on(self._path, names)
                corpus = replace(corpus, name=self._called())
            say(f"{corpus.name}: {known.told()}")
            self._found = corpus, known
        return self._found

    def whole_names(self) -> tuple[str, ...]:
        from overhaul.corpora import open_all_of

        return (open_all_of(self.forget, TO_FORGET).name if self.forget else self._called(),)

    def _called(self) -> str:
        """What texts are called that the ledger alone names."""
        return f"{'+'.join(self.from_ledger or ())} ({TO_FORGET})"

    def whole_corpora(self) -> tuple[Corpus, ...]:
        return (self.to_forget(),)

    @abstractmethod
    def objective(self, model: nn.Module) -> Objective:
        """What is minimised."""

    def needs_reference(self) -> bool:
        """Whether the log-probabilities under the model before are asked for."""
        return False

    def train_parameters(self, model: nn.Module) -> None:
        """Marks what is trained: all of it."""
        model.requires_grad_(True)

    def beside(self, stream: Stream, data: Data) -> Stream:
        """The batches to forget with what is read beside them."""
        return stream

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """The texts to forget in an order drawn anew in every pass."""
        from dataclasses import replace

        from overhaul.checkpoint import trained_tensors
        from overhaul.optim.build import build
        from overhaul.schedules import schedule
        from overhaul.train import Plan
        from overhaul.unlearning import seen, texts
        from overhaul.watch import KeepZeros, LastGood

        found = texts.cut(replace(data, corpus=(corpus := self.to_forget())), self.seq_len)
        if self.from_ledger is not None:
            seen.note(corpus, self.from_the_ledger()[1])
        if self.needs_reference():
            found = texts.with_reference(model, found, batch_size=self.batch_size, dtype=data.dtype)
        objective = self.objective(model)
        self.train_parameters(model)
        steps, ends_pass = self._steps(count := len(found["labels"])), partial(self._ends_pass, count)
        stopping = self.stopping(data, ends_pass, steps)
        return Plan(
            model=model,
            objective=objective,
            stream=self.beside(self.stream(data, corpus, found), data),
            optimizer=build(self, [p for p in model.parameters() if p.requires_grad], model=model),
            schedule=schedule(self.schedule, self.warmup),
            watchers=(KeepZeros(), LastGood(trained_tensors, ends_pass=ends_pass), *stopping),
            steps=steps,
            told=stopping[0].told if stopping else lambda history: None,
        )

    def stopping(self, data: Data, ends_pass: Callable[[int], bool], steps: int) -> tuple[Stopping, ...]:
        """What ends the run before its last step, where that is asked for."""
        from overhaul.unlearning.stopping import Stopping

        if not self.stop.questions:
            return ()
        asked = self.knowledge(data)
        return (Stopping(asked.of, asked.bound, ends_pass=ends_pass, steps=steps),)

    def stream(self, data: Data, corpus: Corpus, found: Windows) -> Stream:
        """Batches of a corpus's windows without end."""
        from overhaul.unlearning import texts

        return texts.endless(found, name=corpus.name, seed=data.seed, batch_size=self.batch_size)

    def _steps(self, count: int) -> int:
        """Optimizer steps for so many windows."""
        return self.steps if self.epochs is None else max(1, math.ceil(self.epochs * count / self._windows_a_step()))

    def _ends_pass(self, count: int, step: int) -> bool:
        """Whether with a step, counted from 1, another pass over so many windows is done."""
        a_step = self._windows_a_step()
        return step * a_step // count > (step - 1) * a_step // count

    def _windows_a_step(self) -> int:
        from overhaul.sharding import num_processes

        return self.batch_size * self.accumulate * num_processes()


class Undoing(Removal):
    """Unlearn texts by learning them further, and taking some strength of what that changed off the model."""

    alpha: Strengths = Field((1.0,), min_length=1)
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="Decay after the warm-up.")

    @model_validator(mode="after")
    def _of_several_one_is_chosen(self) -> Self:
        if len(self.alpha) > 1 and not self.stop.questions:
            raise ValueError("alpha has several values, among which stop.questions chooses; give one, or a rule")
        return self

    def stopping(self, data: Data, ends_pass: Callable[[int], bool], steps: int) -> tuple[Stopping, ...]:
        """Nothing: the texts are learnt to the end."""
        return ()

    def objective(self, model: nn.Module) -> Objective:
        """The texts are learnt; what follows takes that off."""
        from overhaul.objective import CrossEntropy

        return CrossEntropy()

    def choosing(self, model: nn.Module, data: Data) -> Callable[[nn.Module, Callable[[float], None]], None]:
        """What applies the only strength, or the first that meets the rule, to what was made of a model.

        What the rule asks of the model before is asked at once, so that mistakes show before anything is trained.
        """
        from overhaul.unlearning.stopping import first_strength

        if not self.stop.questions:
            return lambda _made, apply: apply(self.alpha[0])
        asked = self.knowledge(data)
        known, bound = asked.of(model), asked.bound(model)

        def choose(made: nn.Module, apply: Callable[[float], None]) -> None:
            first_strength(self.alpha, apply=apply, score=partial(asked.of, made), bound=bound, before=known)

        return choose


class Retaining(Removal):
    """Unlearn texts while others are retained, of which each batch has as many beside."""

    retain: str | None = Field(None, description="Texts to retain, which the model knows too.")
    retain_term: Literal["none", "gdr", "klr"] = Field(
        "gdr",
        description="What holds on to them: their cross-entropy (gdr), the divergence from the model before on them "
        "(klr), or nothing.",
    )
    retain_weight: NonNegative = Field(1.0, description="Weight of that term.")

    @model_validator(mode="after")
    def _what_is_retained_is_named(self) -> Self:
        if self.retain_term != "none" and self.retain is None:
            raise ValueError(
                f"retain_term {self.retain_term} needs texts to retain; use retain FILE, or retain_term none, after "
                "which the model may be of no use"
            )
        if self.retain_term == "none":
            for name in ("retain", "retain_weight"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is read by a retain_term, and there is none; leave it out")
        if self.retain is not None and self.retain == self.forget:
            raise ValueError(f"forget and retain are both {self.forget}: a text is one or the other")
        return self

    def references(self) -> tuple[str, ...]:
        return (*super().references(), *((self.retain,) if self.retain else ()))

    def to_retain(self) -> Corpus | None:
        """All of the texts to retain, where there are some; raises `UserError` where they cannot be read."""
        from overhaul.corpora import open_all_of

        return open_all_of(self.retain, TO_RETAIN) if self.retain else None

    def whole_names(self) -> tuple[str, ...]:
        retained = self.to_retain()
        return (*super().whole_names(), *((retained.name,) if retained else ()))

    def whole_corpora(self) -> tuple[Corpus, ...]:
        retained = self.to_retain()
        return (*super().whole_corpora(), *((retained,) if retained else ()))

    @abstractmethod
    def unlearning(self, model: nn.Module, before: Before) -> Objective:
        """What is minimised of the texts to forget."""

    def holding(self, model: nn.Module, before: Before) -> Objective:
        """What is minimised of the texts to retain, where there are some."""
        from overhaul.distillation import Distill
        from overhaul.objective import CrossEntropy
        from overhaul.unlearning.terms import Beside

        if self.retain_term == "gdr":
            return Beside(CrossEntropy())
        return Beside(Distill(before()))

    def objective(self, model: nn.Module) -> Objective:
        """Both, the second with its weight; a copy of the model before is made where one is asked for, and once."""
        import copy

        before = cache(lambda: copy.deepcopy(model).requires_grad_(False).eval())
        if self.retain is None:
            return self.unlearning(model, before)
        return self.unlearning(model, before) + self.retain_weight * self.holding(model, before)

    def beside(self, stream: Stream, data: Data) -> Stream:
        """Each batch with one to retain."""
        from dataclasses import replace

        from overhaul.unlearning import texts

        if (corpus := self.to_retain()) is None:
            return stream
        kept = texts.cut(replace(data, corpus=corpus), self.seq_len)
        return texts.Beside(stream, self.stream(data, corpus, kept))
