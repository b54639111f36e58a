"""Task vectors: what a model learns of texts in a few more passes, taken off it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overhaul.removal import Removal, Strengths

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from overhaul.data import Data
    from overhaul.objective import Objective
    from overhaul.train import Plan
    from overhaul.unlearning.stopping import Knowledge, Stopping


class TaskVector(Removal):
    """Unlearn texts by learning them further and going as far the other way (task vector)."""

    paper: ClassVar[str] = (
        "Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi: Editing Models with Task Arithmetic, "
        "ICLR 2023, arXiv:2212.04089"
    )

    alpha: Strengths = Field(
        (1.0,),
        min_length=1,
        description="How far; 0 leaves the model as it was, -1 is the one that learnt the texts further. Of several "
        "the first is taken that meets the rule of stop, else the last.",
    )
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

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """Learns the texts further, then `theta - alpha (theta_further - theta)`."""
        from dataclasses import replace
        from functools import partial

        from overhaul.unlearning.stopping import first_strength

        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        rule = self._rule(model, data)

        def finish(learnt: nn.Module) -> nn.Module:
            further = {name: parameter.data for name, parameter in learnt.named_parameters()}

            def apply(alpha: float) -> None:
                for name, parameter in learnt.named_parameters():
                    # Written so that alpha 0 and -1 are exact.
                    parameter.data = before[name].to(parameter).lerp(further[name], -alpha)

            if rule is None:
                apply(self.alpha[0])
            else:
                asked, known, bound = rule
                score = partial(asked.of, learnt)
                first_strength(self.alpha, apply=apply, score=score, bound=bound, before=known)
            return learnt

        return replace(super().plan(model, data), finish=finish)

    def _rule(self, model: nn.Module, data: Data) -> tuple[Knowledge, float, float] | None:
        """What is asked, what is known and what may be: asked before anything is trained, so that mistakes show."""
        if not self.stop.questions:
            return None
        asked = self.knowledge(data)
        return asked, asked.of(model), asked.bound(model)
