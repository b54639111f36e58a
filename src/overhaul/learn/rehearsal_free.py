"""Class-incremental learning without any stored example: four regularisers, and which weights may move at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from overhaul.errors import UserError, did_you_mean
from overhaul.kinds import Kind
from overhaul.learning import FISHER, Readers, SharedLearning
from overhaul.method import Fraction, NonNegative, Positive, Rate

if TYPE_CHECKING:
    from torch import nn

    from overhaul.learners.learner import Learner
    from overhaul.task_data import TaskData
    from overhaul.tasks import TaskSequence
    from overhaul.text_tasks import TextSequence


class RehearsalFree(SharedLearning):
    """Learn classes with no example kept: distillation, a pull to the weights before, or only some of them."""

    paper: ClassVar[str] = (
        "Smith, Tian, Halbe, Hsu, Kira: A Closer Look at Rehearsal-Free Continual Learning, CVPR Workshops 2023, "
        "arXiv:2203.17269"
    )

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.IMAGE_CLASSIFIER, Kind.TEXT_CLASSIFIER, Kind.CAUSAL_LM)

    head: Literal["binary", "softmax"] = Field(
        "binary", description="Loss of new classes: each a binary classifier, or a softmax over all classes so far."
    )
    predictions: NonNegative = Field(1.0, description="Weight of distilling the old model's predictions (PredKD).")
    kd_temperature: Rate = Field(2.0, description="Of PredKD with a softmax head.")
    features: NonNegative = Field(0.0, description="Weight of distilling the old model's features (FeatKD).")
    feature_layer: str = Field("", description="Layer of which they are; empty for what the head reads.")
    weight_term: Literal["none", "l2", "ewc"] = Field(
        "none", description="What weights are held to: those before the task, plainly (l2) or by Fisher information."
    )
    weights: NonNegative = Field(1.0, description="Weight of the weight term.")
    anchor_first: bool = Field(True, description="Whether l2 holds the first task to the weights that were given.")
    fisher: Literal["weighted", "empirical", "exact", "sampled"] = Field(
        "exact", description="Labels of the Fisher information: those given, by probability; given; all; drawn."
    )
    fisher_examples: Positive = Field(1000, description="Examples of each task that it is taken from.")
    fisher_decay: Fraction = Field(1.0, description="What is left of that of earlier tasks.")
    drift_examples: Positive = Field(256, description="Examples of the first task on which features are compared.")

    def readers(self) -> Readers:
        by = self.weight_term
        return (
            (("kd_temperature",), self.predictions > 0 and self.head == "softmax", "predictions with head softmax"),
            (("feature_layer",), self.features > 0, "features, whose weight is 0"),
            (("weights",), by != "none", "a weight term"),
            (("anchor_first",), by == "l2", "weight_term l2"),
            (FISHER, by == "ewc", "weight_term ewc"),
        )

    def _texts(self) -> TaskSequence | TextSequence:
        raise UserError(
            "these texts have no labels, and what is learnt without rehearsal is classes",
            allowed="tables with a column of labels, or corpora that are a class each",
            hint="--label-field label, or --label-by corpus; learn bregman takes texts without labels",
        )

    def check(self, model: nn.Module, data: Any) -> None:
        """Refuses a layer that there is not, classes that come twice, and Fisher information of no task before."""
        super().check(model, data)
        layers = [name for name, _ in model.named_modules() if name]
        if self.feature_layer and self.feature_layer not in layers:
            raise UserError(
                f"there is no layer {self.feature_layer!r}",
                allowed=", ".join(_outer(layers)) + " and what is inside them",
                hint=did_you_mean(self.feature_layer, layers),
            )
        seen: set[int] = set()
        for task in data.sequence.tasks:
            if twice := seen & set(task.classes):
                raise UserError(
                    f"class {data.sequence.classes[min(twice)]} is in two tasks, {task.name} the second",
                    allowed="tasks of classes that no other task has",
                    hint="split, or several sets; learn bregman takes variants",
                )
            seen |= set(task.classes)
        if self.weight_term == "ewc" and len(data.sequence.tasks) == 1:
            raise UserError(
                "ewc holds to the task before, and there is one task", hint="weight_term l2, which holds the first too"
            )

    def learner(self, model: nn.Module, data: TaskData) -> Learner:
        from overhaul.learners.rehearsal_free import RehearsalFreeLearner

        return RehearsalFreeLearner(self, model, data)


def _outer(layers: list[str]) -> list[str]:
    """The layers that are not deep inside others."""
    least = min(name.count(".") for name in layers)
    return [name for name in layers if name.count(".") <= least + 1][:12]
