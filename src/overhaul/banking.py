"""Learning with a bank of parameters for each task: what its methods share, as settings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from overhaul.errors import UserError
from overhaul.kinds import Kind, is_classifier, kind_of_model
from overhaul.learning import Learning, Readers
from overhaul.method import Fraction, Natural, NonNegative, Positive, Rate

if TYPE_CHECKING:
    from torch import nn

    from overhaul.banks import Sockets
    from overhaul.identify import Telling
    from overhaul.learners.learner import Learner
    from overhaul.task_data import TaskData
    from overhaul.tasks import TaskSequence
    from overhaul.text_tasks import TextSequence


class BankLearning(Learning):
    """The model stays as it is; each task has tensors of its own beside it, and no two tasks share any."""

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.IMAGE_CLASSIFIER, Kind.CAUSAL_LM)
    keeps_banks: ClassVar[bool] = True
    by_kind: ClassVar[Mapping[str, tuple[Any, Any]]] = {}
    """What settings are that nobody gave: of classifiers, and of language models."""

    norm_penalty: NonNegative = Field(0.0, description="Weight of the sum of the trained tensors' L2 norms.")
    label_smoothing: Fraction = Field(0.0, description="Share of each label that is spread over a task's classes.")
    keep_best: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Of images: share of each task's training examples that are not trained on, but tell after each "
        "pass how good it was; the best pass is kept. 0: the last one is.",
    )
    patience: Positive | None = Field(
        None, description="Of --keep-best: passes without a better one after which a task is done; none: all are made."
    )
    temperature: Rate = Field(1.0, description="Of the logits by whose entropy a task is told.")
    views: Natural = Field(
        0,
        description="Augmented copies of an example whose logits are averaged before a task is told by them; of a "
        "text, copies without some of its tokens.",
    )
    plain_views: Positive = Field(6, description="How often the example as it is counts among its --views.")
    augment_views: Literal["auto", "noise", "grey", "colour"] = Field(
        "auto",
        description="How --views are made: noise; grey adds shifts, turns and light; colour mirrors and colours too; "
        "auto is noise for grey images and colour for others.",
    )

    identify_by: Literal["entropy", "loss"] = Field(
        "entropy",
        description="Of a language model: what tells the task of a text, the mean entropy of next tokens or the mean "
        "loss on them.",
    )
    prompt_tokens: Positive = Field(
        64,
        description="Of a language model: tokens by which the task of a text is told: of its question, or its first.",
    )
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Of a language model: share of the tokens that each of --views is without."
    )

    def readers(self) -> Readers:
        return ((("patience",), self.keep_best > 0, "keep_best, whose share is 0"),)

    def sequence(self) -> TaskSequence | TextSequence:
        """The tasks, read, with examples aside where the best pass is to be chosen by them."""
        from overhaul.tasks import TaskSequence

        found = super().sequence()
        return found.choosing(self.keep_best) if self.keep_best and isinstance(found, TaskSequence) else found

    def at(self, path: Path) -> Self:
        """The method for the model in a directory: what was left open is what fits its kind."""
        from overhaul import artifact

        return super().at(path).of_kind(artifact.kind_at(path))

    def of_kind(self, kind: Kind) -> Self:
        """The method with every setting that was left open as it is for a kind of model."""
        place = kind is Kind.CAUSAL_LM
        missing = {name: both[place] for name, both in self.by_kind.items() if getattr(self, name) is None}
        return self.model_copy(update=missing)

    @abstractmethod
    def sockets(self, kind: Kind = Kind.IMAGE_CLASSIFIER) -> Sockets:
        """Where this method's banks go in a kind of model."""

    def telling(self) -> Telling:
        """How the task of a text is told."""
        from overhaul.identify import Telling

        return Telling(
            by=self.identify_by,
            tokens=self.prompt_tokens,
            views=self.views,
            left_out=self.token_dropout,
            plain_views=self.plain_views,
            temperature=self.temperature,
        )

    def learner(self, model: nn.Module, data: TaskData) -> Learner:
        from overhaul.learners.banked import BankLearner
        from overhaul.learners.banked_texts import TextBankLearner
        from overhaul.text_task_data import TextTaskData

        method = self.of_kind(kind := kind_of_model(model))
        how: dict[str, Any] = method.begins()
        if isinstance(data, TextTaskData):
            return TextBankLearner(method, model, data, method.sockets(kind), parent=how["parent"])
        return BankLearner(method, model, data, method.sockets(kind), **how)

    def begins(self) -> dict[str, Any]:
        """What the first task trains, and what a later one begins as: `whole_first` and `parent`."""
        return {"whole_first": False, "parent": "none"}

    def check(self, model: nn.Module, data: Any) -> None:
        from torch import nn

        if self.batch_size == 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise UserError("--batch-size 1 leaves batch normalisations nothing to normalise over", allowed="2 or more")
        of_text = type(self).model_fields
        given = [name for name in OF_TEXT if getattr(self, name) != of_text[name].default]
        if is_classifier(model) and given:
            raise UserError(f"--{given[0].replace('_', '-')} is of language models", hint="without it")
        if not is_classifier(model) and self.keep_best:
            raise UserError("--keep-best is of images, and this is a language model", hint="without it")
        if not is_classifier(model) and self.augment_views != "auto":
            raise UserError(
                f"--augment-views {self.augment_views} is of images, and this is a language model",
                hint="--token-dropout: what --views of a text are without",
            )


OF_TEXT = ("identify_by", "prompt_tokens", "token_dropout")
"""Settings that classifiers have no use for."""
