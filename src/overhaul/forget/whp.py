"""Who's Harry Potter: what a model that read texts once more says more likely is taken off the logits at decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from overhaul.method import NonNegative
from overhaul.removal import ONE_OR_SEVERAL, Undoing

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.train import Plan


class Whp(Undoing):
    """Unlearn texts at decoding: two networks, and off the logits what learning the texts further adds (WHP)."""

    paper: ClassVar[str] = (
        "Eldan, Russinovich: Who's Harry Potter? Approximate Unlearning in LLMs, 2023, arXiv:2310.02238"
    )
    networks: ClassVar[int] = 2

    alpha: Annotated[tuple[NonNegative, ...], ONE_OR_SEVERAL] = Field(
        (1.0,),
        min_length=1,
        description="How much of it; 0 leaves what the model says as it was. Of several the first is taken that meets "
        "the rule of stop, else the last.",
    )

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses networks that cannot be one of two.

        Raises:
            UserError: the model generates with a memory of another kind than attention's cache; or as `Removal`.
        """
        from overhaul.errors import UserError
        from overhaul.models import whp

        super().check(model, data)
        if not whp.fits(model):
            raise UserError(
                f"{type(model).__name__} keeps no past_key_values while it generates: two networks need two",
                allowed="forget ga, npo, simnpo and task-vector, which write one network",
            )

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """Learns the texts further, and then puts the model from before in front of what came out."""
        import copy
        from dataclasses import replace

        from overhaul import models

        before = copy.deepcopy(model).requires_grad_(False)
        choose = self.choosing(model, data)

        def finish(learnt: nn.Module) -> nn.Module:
            models.register("whp")
            _, joined = models.classes("whp")
            both = joined.joining(before, learnt, self.alpha[0])

            def apply(alpha: float) -> None:
                both.config.alpha = alpha

            choose(both, apply)
            return both

        return replace(super().plan(model, data), finish=finish)
