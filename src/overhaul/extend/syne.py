"""Llama-3-SynE's continual pre-training: topics in rounds, easy text first, synthetic questions (Chen et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from overhaul import shares
from overhaul.errors import Diverged, UserError
from overhaul.extend.mixing import Mixing
from overhaul.method import NonNegative, PeakRate, Positive
from overhaul.progress import say
from overhaul.schedules import part_of

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from overhaul.data import Data
    from overhaul.mixture import Mix, Source
    from overhaul.stream import Stream
    from overhaul.train import Plan

PROBED_WINDOWS = 32
"""Of a topic's held-out text, at most, between two rounds."""


class Syne(Mixing):
    """Add a language and a skill: easy text first, topics that suffer more often, and synthetic questions mixed in.

    Rounds are trainings of --steps each, under one schedule. Between two of them the shares of the topics follow what
    happened to their perplexities.
    """

    paper: ClassVar[str] = (
        "Chen et al.: Towards Effective and Efficient Continual Pre-training of Large Language Models, ACL 2025, "
        "arXiv:2407.18743"
    )

    lr: PeakRate = 1e-5
    schedule: Literal["rewarm-cosine", "rewarm", "constant", "wsd", "infinite", "hold", "anneal"] = Field(
        "wsd", description="As extend cpt; wsd is the authors', and decays at the end of the last round alone."
    )
    order: Literal["shuffled", "easy-first"] = Field(
        "shuffled", description="Of the documents of --data: easy-first are those with the lowest loss under the model."
    )
    scored_tokens: Positive = Field(256, description="Of easy-first: tokens of each document that are scored.")
    rounds: Positive = Field(1, description="Trainings of --steps each.")
    topics: tuple[str, ...] = Field(
        (), description="Texts of --mix whose shares follow their perplexities from round to round."
    )
    feedback: NonNegative = Field(0.5, description="How strongly; 0 leaves them as they are.")

    _order_D: Any = PrivateAttr(None)

    @model_validator(mode="after")
    def _topics_are_mixed(self) -> Syne:
        beside = shares.parse(self.mix)
        if strange := [topic for topic in self.topics if topic not in beside]:
            told = ", ".join(beside) or "nothing"
            raise ValueError(f"{strange[0]} is no text of mix, which has {told}")
        if self.topics and (self.rounds == 1 or len(self.topics) == 1):
            raise ValueError("topics need two or more of them, and rounds 2 or more, between which their shares change")
        if self.epochs is not None and self.rounds > 1:
            raise ValueError(f"epochs {self.epochs:g} with rounds {self.rounds}: use steps, which are those of a round")
        return self

    def in_stages(self) -> bool:
        """Whether there are rounds."""
        return self.rounds > 1

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Also refuses rounds in sharded parameters, and to score what the model cannot read.

        Raises:
            UserError: the one or the other.
        """
        from overhaul.generation import longest
        from overhaul.scorers import FEWEST
        from overhaul.sharding import refuse_sharded

        if self.rounds > 1:
            refuse_sharded("--rounds")
        if self.order == "easy-first" and not FEWEST < self.scored_tokens <= longest(model):
            raise UserError(
                f"--scored-tokens {self.scored_tokens}",
                allowed=f"{FEWEST + 1} to {longest(model)}, which the model reads",
            )
        super().check(model, data)

    def _steps(self, data: Data) -> int:
        return super()._steps(data) * self.rounds

    def new_source(self, data: Data) -> Source:
        """The text of --data, shuffled or easy first."""
        if self.order == "shuffled":
            return super().new_source(data)
        order_D: np.ndarray = self._order_D
        # A run that goes on ends the pass in the order that it began with: the model has changed since.
        return self.chosen(data, lambda number: order_D, name="easy first")

    def mixed(self, sources: Mapping[str, Source], data: Data) -> Stream:
        """As of cpt; where topics follow their perplexities, the first round's mixture, which ends with it."""
        from overhaul.mixture import Mix

        windows = super().mixed(sources, data)
        if self.topics and isinstance(windows, Mix):
            tokens = self._num_tokens(data) // self.rounds
            return Mix(
                {name: one.windows for name, one in sources.items()}, [windows.phases[0]._replace(tokens=tokens)]
            )
        return windows

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """As of cpt, after the documents were scored."""
        if self.order == "easy-first":
            self._order_D = _easy_first(model, data, self.scored_tokens)
        return super().plan(model, data)

    def stages(self, model: nn.Module, data: Data) -> Iterator[Plan]:
        """A plan for each round; model, moments, places and the rate go on."""
        from overhaul.mixture import Mix

        plan = self.plan(model, data)
        if self.rounds == 1:
            yield plan
            return
        before, table = self._perplexities(model, data), []
        for number in range(self.rounds):
            if number:
                model.requires_grad_(True)
            if number and self.topics:
                mix, now = plan.stream.sources[0], self._perplexities(model, data)
                assert isinstance(mix, Mix)
                table += self._follow(mix, data, before, now, number)
                before = now
            last = number == self.rounds - 1
            rate = part_of(plan.schedule, number / self.rounds, (number + 1) / self.rounds)
            finish = plan.finish if last else _as_it_is
            yield replace(plan, schedule=rate, finish=finish, hands_on=not last or self.keep_state)
        if table:
            _note(table)

    def _follow(
        self, mix: Mix, data: Data, before: Mapping[str, float], now: Mapping[str, float], number: int
    ) -> list[tuple[str, ...]]:
        """Gives the mixture a next round with the topics' new shares; returns what the table says of them."""
        from overhaul.mixture import Phase

        last = mix.phases[-1]
        names = {path: self.read(path, data).corpus.name for path in self.topics}
        told = {path: last.shares[name] for path, name in names.items()}
        change = {path: now[path] - before[path] for path in now}
        if odd := [names[path] for path in now if not math.isfinite(change[path])]:
            raise Diverged(
                f"the perplexity of {odd[0]} is not finite after round {number}", hint=f"--lr {self.lr / 10:g}"
            )
        changed = shares.fed_back(told, change, self.feedback)
        mix.then(Phase({**last.shares, **{names[path]: share for path, share in changed.items()}}, last.tokens))
        return [
            (str(number), name, f"{before[path]:.2f}", f"{now[path]:.2f}", f"{told[path]:.3g}", f"{changed[path]:.3g}")
            for path, name in names.items()
        ]

    def _perplexities(self, model: nn.Module, data: Data) -> dict[str, float]:
        """Held-out, by topic."""
        from overhaul import evaluate

        found = {}
        for path in self.topics:
            windows_NT = self.read(path, data).windows("heldout", seq_len=self.seq_len, limit=PROBED_WINDOWS)
            found[path] = evaluate.perplexity(model, windows_NT, dtype=data.dtype).estimate.value
        return found


def _easy_first(model: nn.Module, data: Data, tokens: int) -> np.ndarray:
    """Numbers of the training documents from the lowest loss to the highest (D,)."""
    import numpy as np

    from overhaul.scorers import document_losses

    model.eval()
    losses_D = document_losses(model, data, data.corpus.train, max_tokens=tokens, dtype=data.dtype, title="scoring")
    order_D = np.argsort(losses_D, kind="stable")
    scored_D = losses_D[np.isfinite(losses_D)]
    low, middle, high = np.quantile(scored_D, (0.0, 0.5, 1.0)) if len(scored_D) else (math.nan,) * 3
    say(f"{data.corpus.name} from a loss of {low:.2f} to {high:.2f} nats, {middle:.2f} in the middle")
    return order_D


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _note(rows: list[tuple[str, ...]]) -> None:
    from overhaul.journal import note_table

    columns = ("after round", "topic", "perplexity before it", "after it", "share in it", "share in the next")
    note_table("The shares of the topics followed their perplexities", columns, rows)
