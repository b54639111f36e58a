"""What the methods share that read several texts beside the new one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from overhaul import shares
from overhaul.extend.cpt import ContinualPretraining
from overhaul.shares import Mixture

if TYPE_CHECKING:
    from overhaul.data import Data
    from overhaul.mixture import Source


class Mixing(ContinualPretraining):
    """Continual pre-training on any number of texts, each with a share of the tokens; --data has what is left."""

    mix: Mixture = Field(
        (),
        description="Further texts, each CORPUS=SHARE of the tokens, or a YAML file of shares; --data has the rest.",
    )

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Mixing:
        beside = shares.parse(self.mix)
        if self.replay in beside:
            raise ValueError(f"mix and replay are both {self.replay}: a text is one or the other")
        if shares.above(total := math.fsum(self.shares().values()), 1):
            raise ValueError(f"mix and replay together are {total:g} of the tokens, which is more than 1")
        return self

    @model_validator(mode="after")
    def _epochs_are_of_something(self) -> Mixing:
        if self.epochs is not None and not shares.above(self.new_share(), 0):
            raise ValueError(
                f"epochs {self.epochs:g} are passes over data, which has no share of the tokens; use steps"
            )
        return self

    def shares(self) -> dict[str, float]:
        """Of all tokens, those of each text beside --data."""
        return shares.parse(self.mix) | super().shares()

    def read(self, path: str, data: Data) -> Data:
        """A text beside --data; what is mixed in counts as plain text, questions with their answers too."""
        return data.on(path, plain=path != self.replay)

    def sources(self, data: Data) -> dict[str, Source]:
        """The new text, the further ones, and what is replayed."""
        found = super().sources(data)
        for path in self.texts():
            if path != self.replay:
                told = self.read(path, data)
                found[told.corpus.name] = self.source(told)
        return found
