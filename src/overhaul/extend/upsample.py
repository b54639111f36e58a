"""Domain upsampling: another mixture in the last part of a run (Blakeney, Paul, Larsen, Owen, Frankle, 2024)."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field, model_validator

from overhaul import shares
from overhaul.extend.mixing import Mixing
from overhaul.method import Share
from overhaul.shares import Mixture


class Upsampling(Mixing):
    """Go on pre-training on a mixture of texts, and towards the end on one with more of the valuable ones.

    The rate goes on through the change as if there were none. A run without it, with as many tokens, is the same with
    `--last-mix` like `--mix`.
    """

    paper: ClassVar[str] = (
        "Blakeney, Paul, Larsen, Owen, Frankle: Does your data spark joy? Performance gains from domain upsampling at "
        "the end of training, COLM 2024, arXiv:2406.03476"
    )

    last: Share = Field(0.2, description="Share of the whole run, at its end, with the other mixture.")
    last_mix: Mixture = Field(
        (),
        description="The mixture there, as --mix: what is not named has no share in it, and --data has the rest.",
    )

    @model_validator(mode="after")
    def _last_part_is_of_known_texts(self) -> Upsampling:
        if not self.last_mix:
            raise ValueError("last_mix is empty: name the shares of the last part, such as last_mix stdlib=0.5")
        last = shares.parse(self.last_mix)
        if self.replay in last:
            raise ValueError(f"{self.replay} is replayed: it has its share in both parts, and none in last_mix")
        if shares.above(total := math.fsum([*last.values(), *self._replayed().values()]), 1):
            raise ValueError(f"last_mix and replay together are {total:g} of the tokens, which is more than 1")
        return self

    def _replayed(self) -> dict[str, float]:
        return {} if self.replay is None else {self.replay: self.shares()[self.replay]}

    def phases(self) -> list[tuple[float, dict[str, float]]]:
        """The mixture of most of the run, then that of its last part."""
        return [(round(1 - self.last, 12), self.shares()), (1.0, shares.parse(self.last_mix) | self._replayed())]
