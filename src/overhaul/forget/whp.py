"""Who's Harry Potter: what a model that read texts once more says more likely is taken off the logits at decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from overhaul.method import NonNegative
from overhaul.removal import Removal

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.objective import Objective
    from overhaul.train import Plan


class Whp(Removal):
    """Unlearn texts at decoding: two networks, and off the logits what learning the texts further adds (WHP)."""

    paper: ClassVar[str] = (
        "Eldan, Russinovich: Who's Harry Potter? Approximate Unlearning in LLMs, 2023, arXiv:2310.02238"
    )
    networks: ClassVar[int] = 2

    alpha: NonNegative = Field(1.0, description="How much of it; 0 leaves what the model says as it was.")
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="Decay after the warm-up.")

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses networks that cannot be one of two.

        Raises:
            UserError: the model generates with a memory of another kind than attention's cache.
        """
        from overhaul.errors import UserError
        from overhaul.models import whp

        if not whp.fits(model):
            raise UserError(
                f"{type(model).__name__} keeps no past_key_values while it generates: two networks need two",
                allowed="forget ga, npo, simnpo and task-vector, which write one network",
            )

    def objective(self, model: nn.Module) -> Objective:
        """The texts are learnt; what is said more likely then is taken off."""
        from overhaul.objective import CrossEntropy

        return CrossEntropy()

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """Learns the texts further, and then puts the model from before in front of what came out."""
        import copy
        from dataclasses import replace

        from overhaul import models

        before = copy.deepcopy(model).requires_grad_(False)

        def finish(learnt: nn.Module) -> nn.Module:
            models.register("whp")
            _, joined = models.classes("whp")
            return joined.joining(before, learnt, self.alpha)

        return replace(super().plan(model, data), finish=finish)
