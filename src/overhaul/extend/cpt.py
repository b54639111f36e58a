"""Continual pre-training with re-warming, re-decay, replay and schedules without an end (Ibrahim et al., 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from overhaul.errors import UserError
from overhaul.method import Fraction, PeakRate, Share, Training
from overhaul.schedules import Piece, Schedule, annealing, chain, infinite, schedule, warmup_stable_decay

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from overhaul.data import Data
    from overhaul.objective import Objective
    from overhaul.stream import Stream
    from overhaul.train import Plan

REPLAYED = 0.05
"""Share of the tokens where a corpus is replayed and no share was asked for: the paper's for a weak shift."""
UNREAD = 0.01
"""Share of unknown tokens from which on a text is worth a word."""
MANY_PASSES = 4
"""Over a corpus that is replayed, from which on repeating it is worth a word (Muennighoff et al., 2023)."""


class ContinualPretraining(Training):
    """Go on pre-training on new text, with a share of the old among it and a rate that rises and falls again."""

    paper: ClassVar[str] = (
        "Ibrahim et al.: Simple and Scalable Strategies to Continually Pre-train Large Language Models, TMLR 2024, "
        "arXiv:2403.08763"
    )

    lr: PeakRate = 3e-4
    warmup: Fraction = Field(0.01, description="Share of the steps with a linearly rising rate.")
    schedule: Literal["rewarm-cosine", "rewarm", "constant", "wsd", "infinite", "hold", "anneal"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        "rewarm-cosine",
        description="rewarm-cosine, rewarm, wsd and infinite warm up, then fall by a cosine, not at all, in a line at "
        "the end, or to a rate that can be kept for ever; hold keeps that one, anneal falls from it; constant is --lr.",
    )
    floor: Fraction = Field(0.1, description="Rate at the end of a fall, as a share of --lr.")
    decay: Share = Field(0.1, description="Of wsd: share of the steps, at the end, in which the rate falls.")
    cooldown: Fraction = Field(0.6, description="Of infinite: share of the steps in which the rate falls to --hold.")
    cooldown_shape: Literal["cosine", "inverse-sqrt"] = Field("cosine", description="Of infinite: how it falls.")
    hold: Share = Field(
        0.55, description="Of infinite: the rate that is kept, as a share of --lr; anneal begins there."
    )
    replay: str | None = Field(
        None, description="Corpus of what the model was trained on before; the loss on it is watched."
    )
    replay_share: Share | None = Field(
        None, description=f"Of the tokens, those from --replay; {REPLAYED} where it is given. Others are as many fewer."
    )
    keep_zeros: bool = Field(True, description="Hold the pruned weights of a pruned model at zero.")
    keep_state: bool = Field(
        False, description="Write moments and the places in all texts beside the weights, for a run that goes on."
    )
    go_on: bool = Field(
        False, description="Begin with the moments, the rate and the places that the run before has left."
    )
    _path: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _replay_has_a_corpus(self) -> ContinualPretraining:
        if self.replay is None and self.replay_share is not None:
            raise ValueError(
                f"replay_share {self.replay_share:g} needs a corpus to replay: use replay CORPUS, with text like that "
                "which the model was trained on, such as sample or boolq-passages for English"
            )
        return self

    @model_validator(mode="after")
    def _rates_fall(self) -> ContinualPretraining:
        if self.schedule in ("infinite", "anneal") and self.hold < self.floor:
            raise ValueError(f"the rate that is kept, hold {self.hold:g}, is below floor {self.floor:g}")
        if self.schedule == "anneal" and self.floor == 0:
            raise ValueError("an exponential fall never ends at 0; use floor 0.01 or more")
        try:
            self.rate()
        except ValueError as error:
            raise ValueError(
                f"{error}: warmup {self.warmup:g}, with decay {self.decay:g} of wsd or cooldown {self.cooldown:g} of "
                "infinite, is more than the whole run"
            ) from error
        return self

    def at(self, path: Path) -> Self:
        """The same for the model in a directory, whose run may be gone on with.

        Raises:
            UserError: that run has left nothing to go on with.
        """
        from overhaul import continuation

        if self.go_on:
            continuation.check(path)
        placed = self.model_copy()
        placed._path = path
        return placed

    def texts(self) -> tuple[str, ...]:
        """The corpus that is replayed."""
        return (self.replay,) if self.replay is not None else ()

    def rate(self, start: float = 0.0) -> Schedule:
        """The learning rate over the run, as a factor of --lr.

        Args:
            start: factor that a warm-up begins at.
        """
        match self.schedule:
            case "rewarm-cosine":
                return schedule("cosine", self.warmup, self.floor, start=start)
            case "rewarm":
                return schedule("constant", self.warmup, start=start)
            case "constant":
                return schedule("constant", 0.0)
            case "wsd":
                return warmup_stable_decay(self.warmup, self.decay, self.floor, start=start)
            case "infinite":
                return infinite(self.warmup, self.cooldown, self.hold, shape=self.cooldown_shape, start=start)
            case "hold":
                return chain((Piece(1.0, self.hold),), start=self.hold)
            case "anneal":
                return annealing(self.floor, start=self.hold)

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses a replay of the new text itself, and says what is odd about the texts.

        Raises:
            UserError: both texts are the same, or a state is to be put into sharded parameters.
        """
        from overhaul.progress import say
        from overhaul.sharding import is_sharded

        if self.go_on and is_sharded():
            raise UserError("--go-on needs whole parameters, which FSDP has not", hint="accelerate launch --multi_gpu")
        if data is None:
            return
        if data.tokenizer.chat_template:
            say("note: the model has a chat template; what it forgets of conversations is not seen in these losses")
        if (share := data.unread_share()) > UNREAD:
            say(f"warning: {share:.1%} of the tokens of {data.corpus.name} are unknown, or bytes of words spelled out")
        if self.replay is None:
            return
        old = data.on(self.replay)
        if old.corpus.fingerprint == data.corpus.fingerprint:
            raise UserError(
                f"--replay {self.replay} is the new text itself",
                allowed="text like that which the model was trained on before",
            )
        total = data.steps_for(self).steps * self.batch_size * self.accumulate * self.seq_len
        wanted = round(self.replayed_share() * total)
        say(f"note: {wanted:,} of {total:,} tokens are replayed from {self.replay}, and as many fewer are new")
        if wanted > MANY_PASSES * old.num_training_tokens:
            passes = wanted / old.num_training_tokens
            say(f"warning: that is {passes:.1f} times all of {self.replay}, {old.num_training_tokens:,} tokens")

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """All parameters; new moments, or those of the run before; new text shuffled, old in its own order."""
        from overhaul import continuation
        from overhaul.layers.masked import without_masks
        from overhaul.optim.build import build
        from overhaul.progress import say
        from overhaul.train import Plan
        from overhaul.watch import KeepZeros

        model.requires_grad_(True)
        objective, optimizer = self.objective(model), build(self, model.parameters(), model=model)
        sources = self.sources(data)
        streams = {name: windows for name, (windows, _) in sources.items()}
        before = continuation.read(self._path) if self.go_on and self._path else None
        if before:
            known = continuation.take_up(before, self.optimizer, optimizer, streams)
            say(
                f"going on at a rate of {before.rate:.3g}" + "".join(f", in {name} where it was left" for name in known)
            )
        rate = self.rate(before.rate / self.lr if before else 0.0)

        def finish(trained: nn.Module) -> nn.Module:
            if self.keep_state:
                continuation.leave(self.optimizer, optimizer, rate(1.0) * self.lr, streams, before)
            return trained if self.keep_zeros else without_masks(trained)

        return Plan(
            model=model,
            objective=objective,
            stream=self.mixed(sources),
            optimizer=optimizer,
            schedule=rate,
            watchers=(KeepZeros(),) if self.keep_zeros else (),
            finish=finish,
        )

    def objective(self, model: nn.Module) -> Objective:
        """The next word, whatever the text.

        Args:
            model: as it is before the first step.
        """
        from overhaul.objective import CrossEntropy

        return CrossEntropy()

    def sources(self, data: Data) -> dict[str, tuple[Stream, float]]:
        """Windows without end and their share of the tokens, by the name of their text; the new text first."""
        new = {data.corpus.name: (data.endless(seq_len=self.seq_len), self.new_share())}
        if self.replay is None:
            return new
        old = data.on(self.replay)
        return new | {old.corpus.name: (old.endless(seq_len=self.seq_len, in_order=True), self.replayed_share())}

    def mixed(self, sources: Mapping[str, tuple[Stream, float]]) -> Stream:
        """Micro-batches of windows from all sources in their shares."""
        from overhaul.mixture import Mix, Phase
        from overhaul.stream import Batch

        streams = {name: windows for name, (windows, _) in sources.items()}
        shares = {name: share for name, (_, share) in sources.items()}
        windows = Mix(streams, [Phase(shares)]) if len(streams) > 1 else next(iter(streams.values()))
        return Batch(windows, batch_size=self.batch_size)

    def replayed_share(self) -> float:
        """Of all tokens."""
        if self.replay is None:
            return 0.0
        return REPLAYED if self.replay_share is None else self.replay_share

    def new_share(self) -> float:
        """Of all tokens, those of --data."""
        return 1 - self.replayed_share()
