"""Continual pre-training with re-warming, re-decay, replay and schedules without an end (Ibrahim et al., 2024)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from overhaul.errors import UserError
from overhaul.method import Fraction, PeakRate, Share, Training
from overhaul.progress import say
from overhaul.schedules import Piece, Schedule, annealing, chain, infinite, part_of, schedule, warmup_stable_decay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import torch
    from torch import nn

    from overhaul.continuation import Continuation
    from overhaul.data import Data
    from overhaul.mixture import Mix, Source
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

    reads_all: ClassVar[bool] = True
    """Whether the passes over the new text are over all of it."""

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
    hold: Share = Field(0.55, description="Of infinite, hold and anneal: the rate that is kept, as a share of --lr.")
    replay: str | None = Field(
        None, description="Corpus of what the model was trained on before; the loss on it is watched."
    )
    replay_share: Share | None = Field(
        None, description=f"Of the tokens, those from --replay; {REPLAYED} where it is given. Others are as many fewer."
    )
    from_scratch: bool = Field(
        False, description="Begin with random weights: what training on old and new text together would have given."
    )
    document_mask: bool = Field(
        False,
        description="Begin attention and positions anew with each document of a window; otherwise a token sees "
        "the documents before its own too.",
    )
    keep_zeros: bool = Field(True, description="Hold the pruned weights of a pruned model at zero.")
    part: tuple[Fraction, Fraction] = Field(
        (0.0, 1.0),
        description="From where to where of a whole run, in shares of it: 0 0.8 with --keep-state, then 0.8 1 with "
        "--go-on, are one run with one schedule.",
    )
    drift: bool = Field(
        False,
        description="Record at every --eval-every how far the bottom and top blocks have moved, relative to their "
        "weights before.",
    )
    keep_state: bool = Field(
        False, description="Write moments and the places in all texts beside the weights, for a run that goes on."
    )
    go_on: bool = Field(
        False,
        description="Begin with the moments and places that the run before has left; a warm-up, hold and anneal begin "
        "with its rate.",
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
    def _scratch_has_no_past(self) -> ContinualPretraining:
        if self.from_scratch and self.go_on:
            raise ValueError("from_scratch begins anew, and go_on where the run before ended; use one of them")
        return self

    @model_validator(mode="after")
    def _part_has_a_length(self) -> ContinualPretraining:
        begins, ends = self.part
        if begins >= ends:
            raise ValueError(f"part {begins:g} {ends:g} ends before it begins")
        if not begins and ends < 1 and self.go_on and self.schedule != "constant":
            raise ValueError(
                f"part {begins:g} {ends:g} is the beginning of a run: go_on would begin it at the rate of another one, "
                "and its later parts not; use part 0 1, or schedule constant"
            )
        if begins and not self.go_on:
            raise ValueError(
                f"part {begins:g} {ends:g} is the later part of a run: use go_on, in the earlier keep_state"
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

    @model_validator(mode="after")
    def _drift_is_looked_at(self) -> ContinualPretraining:
        if self.drift and not self.eval_every:
            raise ValueError("drift is recorded at every evaluation while training; use eval_every 10, or without it")
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
        """The corpora that are mixed with that of --data."""
        return tuple(dict.fromkeys(path for _, shares in self.phases() for path in shares))

    def rate(self, left: float | None = None) -> Schedule:
        """The learning rate over the run, as a factor of --lr.

        Args:
            left: the factor that the run before has left: a warm-up begins there, hold and anneal go on there. The
                later part of a run goes on with the schedule of the whole.

        Raises:
            ValueError: pieces that are longer than the whole run.
        """
        begins, ends = self.part
        return part_of(self._whole_rate(None if begins else left), begins, ends)

    def _whole_rate(self, left: float | None) -> Schedule:
        start, kept = left or 0.0, self.hold if left is None else left
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
                return chain((Piece(1.0, kept),), start=kept)
            case "anneal":
                return annealing(self.floor, start=kept)

    def left_bytes(self, model: nn.Module) -> int:
        """Two moments of 32 bits for each parameter, at most."""
        return 8 * sum(parameter.numel() for parameter in model.parameters()) if self.keep_state else 0

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses to mix the new text with itself, and says what is odd about the texts.

        Raises:
            UserError: two texts are the same, a state is to be put into sharded parameters, or the model cannot keep
                the documents of a window apart.
        """
        from overhaul.drift import start_bytes
        from overhaul.interop import hf
        from overhaul.select import has_adapters
        from overhaul.sharding import refuse_sharded

        if self.from_scratch and has_adapters(model):
            raise UserError("--from-scratch: the model has adapters on top of its weights", hint="a whole model")
        if self.go_on:
            refuse_sharded("--go-on")
        if self.document_mask and not hf.keeps_documents_apart(model):
            raise UserError(
                "--document-mask: this model sees past positions that begin anew, so documents cannot be kept apart",
                allowed="models whose attention heeds position_ids, such as Llama, Mistral and Qwen",
                hint="--no-document-mask",
            )
        if self.drift:
            refuse_sharded("--drift")
            say(f"note: --drift holds a copy of the bottom and top blocks, {start_bytes(model) / 1e6:.1f} MB of memory")
        if data is None:
            return
        if data.tokenizer.chat_template:
            say("note: the model has a chat template; what it forgets of conversations is not seen in these losses")
        if (share := data.unread_share()) > UNREAD:
            say(f"warning: {share:.1%} of the tokens of {data.corpus.name} are unknown, or bytes of words spelled out")
        for until in self._skipped(data):
            steps = self._steps(data)
            say(f"warning: of {steps} steps there is none with the mixture that ends at {until:g} of the run")
        total, drawn, known = self._num_tokens(data), self._drawn(data), dict[str, str]()
        if self.reads_all:
            _warn_of_many_passes(data.corpus.name, total - sum(drawn.values()), data)
        if data.tokenizer.eos_token_id is None:
            say("warning: the tokenizer has no end-of-text token: nothing tells where a document ends")
        for path, wanted in drawn.items():
            raw = data.on(path).corpus.fingerprint
            if raw == data.corpus.fingerprint:
                raise UserError(
                    f"{path} is the new text itself",
                    allowed="with --replay, text like that which the model was trained on before",
                )
            if raw in known:
                raise UserError(
                    f"{path} is the same text as {known[raw]}", hint="one of them, with the sum of both shares"
                )
            known[raw] = path
            say(f"note: {wanted:,} of {total:,} tokens are from {path}, and as many fewer are new")
            _warn_of_many_passes(path, wanted, self.read(path, data))

    def read(self, path: str, data: Data) -> Data:
        """A text beside --data as this method reads it."""
        return data.on(path)

    def _drawn(self, data: Data) -> dict[str, int]:
        """About how many tokens each text gives beside --data."""
        drawn = dict.fromkeys(self.texts(), 0.0)
        for tokens, shares in self._lengths(data):
            for path, share in shares.items():
                drawn[path] += tokens * share
        return {path: round(tokens) for path, tokens in drawn.items()}

    def _num_tokens(self, data: Data) -> int:
        """Of this run, on all processes."""
        return self._steps(data) * self._step_tokens()

    def _steps(self, data: Data) -> int:
        from overhaul.sharding import num_processes

        return data.steps_for(self, processes=num_processes()).steps

    def _step_tokens(self) -> int:
        from overhaul.sharding import num_processes

        return self.batch_size * self.accumulate * self.seq_len * num_processes()

    def _lengths(self, data: Data) -> list[tuple[int, dict[str, float]]]:
        """Tokens of each phase that is in this part of the run, in whole steps, with its shares.

        Where two have the same shares, they are one; what is shorter than a step is left out.
        """
        found: list[tuple[int, dict[str, float]]] = []
        for _, steps, shares in self._in_steps(data):
            tokens = steps * self._step_tokens()
            if found and found[-1][1] == shares:
                tokens += found.pop()[0]
            if tokens:
                found.append((tokens, shares))
        return found

    def _skipped(self, data: Data) -> list[float]:
        """Until which share of the whole run those phases last for which this part has no step."""
        return [until for until, steps, _ in self._in_steps(data) if not steps]

    def _in_steps(self, data: Data) -> list[tuple[float, int, dict[str, float]]]:
        """Each phase that is in this part of the run: where it ends, how many steps it has, its shares."""
        steps, (begins, ends) = self._steps(data), self.part
        found, starts, done = [], begins, 0
        for until, shares in self.phases():
            if (until := min(until, ends)) > starts:
                border = round((until - begins) / (ends - begins) * steps)
                found.append((until, border - done, shares))
                starts, done = until, border
        return found

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """All parameters; new moments, or those of the run before; new text shuffled, old in its own order.

        Raises:
            UserError: what the run before has left does not fit this one.
        """
        from functools import partial

        from overhaul.drift import drift_of, start_of
        from overhaul.layers.masked import without_masks
        from overhaul.optim.build import build
        from overhaul.stream import Batch
        from overhaul.train import Plan
        from overhaul.watch import KeepZeros

        model.requires_grad_(True)
        if self.from_scratch:
            start_over(model)
        objective, optimizer = self.objective(model), build(self, model.parameters(), model=model)
        sources = self.sources(data)
        windows = self.mixed(sources, data)
        before = self._before(optimizer, sources, windows)
        rate = self.rate(before.rate / self.lr if before else None)
        if before:
            first = rate(0.5 / self._steps(data)) * self.lr
            say(f"going on from a rate of {before.rate:.3g}; the first step has {first:.3g}")

        def finish(trained: nn.Module) -> nn.Module:
            if self.keep_state:
                self._leave(optimizer, rate(1.0) * self.lr, sources, windows, before)
            return trained if self.keep_zeros else without_masks(trained)

        return Plan(
            model=model,
            objective=objective,
            stream=Batch(windows, batch_size=self.batch_size),
            optimizer=optimizer,
            schedule=rate,
            watchers=(KeepZeros(),) if self.keep_zeros else (),
            finish=finish,
            starts_over=self.from_scratch,
            probes=(partial(drift_of, start=start_of(model)),) if self.drift else (),
        )

    def _before(
        self, optimizer: torch.optim.Optimizer, sources: Mapping[str, Source], windows: Stream
    ) -> Continuation | None:
        """What the run before has left, with moments and places put where they were; None where it is not asked for."""
        from overhaul import continuation
        from overhaul.mixture import Mix

        if not self.go_on:
            return None
        if self._path is None:
            raise UserError("go_on needs the directory of the run before", hint="method.at(directory)")
        left = continuation.read(self._path)
        if self.schedule == "anneal" and left.rate < self.floor * self.lr:
            raise UserError(
                f"the run before ended at a rate of {left.rate:.3g}, below that which anneal would end at",
                hint=f"--floor {left.rate / self.lr / 10:.2g}",
            )
        continuation.take_up(left, self.optimizer, optimizer)
        for name, source in sources.items():
            if source.key in left.places:
                source.windows.load_state_dict(left.places[source.key])
                say(f"{name} is read on from where it was left")
            else:
                say(f"{name} is read from its beginning: the run before had another text, choice, --seq-len or --seed")
        if isinstance(windows, Mix) and (key := _key(windows, 0, sources)) in left.places:
            windows.balance = left.places[key]
        return left

    def _leave(
        self,
        optimizer: torch.optim.Optimizer,
        rate: float,
        sources: Mapping[str, Source],
        windows: Stream,
        before: Continuation | None,
    ) -> None:
        """Notes what is to be written for a run that goes on; places that this one did not read are handed on."""
        from overhaul import continuation
        from overhaul.mixture import Mix

        places = dict(before.places) if before else {}
        places |= {source.key: source.windows.state_dict() for source in sources.values()}
        if isinstance(windows, Mix):
            places[_key(windows, windows.phase, sources)] = windows.balance
        continuation.leave(continuation.Continuation(self.optimizer, optimizer.state_dict(), rate, places))

    def objective(self, model: nn.Module) -> Objective:
        """The next word, whatever the text.

        Args:
            model: as it is before the first step.
        """
        from overhaul.objective import CrossEntropy

        return CrossEntropy()

    def sources(self, data: Data) -> dict[str, Source]:
        """What is read, by the name of the text; the new text first."""
        found = {data.corpus.name: self.new_source(data)}
        if self.replay is not None:
            old = data.on(self.replay)
            found[old.corpus.name] = self.source(old, in_order=True)
        return found

    def new_source(self, data: Data) -> Source:
        """The text of --data."""
        return self.source(data)

    def source(self, text: Data, *, in_order: bool = False) -> Source:
        """All of a text, shuffled or in its own order."""
        from overhaul.mixture import Source

        how: dict[str, Any] = {"seq_len": self.seq_len, "document_mask": self.document_mask, "in_order": in_order}
        return Source(text.endless(**how), text.place(**how))

    def chosen(self, text: Data, places: Callable[[int], np.ndarray], *, name: str) -> Source:
        """Some documents of a text: numbers of those of each pass, under a name that says which."""
        from overhaul.mixture import Source

        how: dict[str, Any] = {"seq_len": self.seq_len, "document_mask": self.document_mask}
        return Source(text.chosen(places, name=name, **how), f"{text.place(**how)}/{name}")

    def mixed(self, sources: Mapping[str, Source], data: Data) -> Stream:
        """Windows of all sources in their shares, phase after phase; of one alone as they are."""
        from overhaul.mixture import Mix, Phase
        from overhaul.shares import above

        if len(sources) == 1:
            return next(iter(sources.values())).windows
        phases, lengths = [], self._lengths(data)
        for number, (tokens, shares) in enumerate(lengths, 1):
            named = {data.on(path).corpus.name: share for path, share in shares.items()}
            if above(1, told := math.fsum(named.values())):
                named[data.corpus.name] = 1 - told
            phases.append(Phase(named, tokens if number < len(lengths) else None))
        return Mix({name: source.windows for name, source in sources.items()}, phases)

    def phases(self) -> list[tuple[float, dict[str, float]]]:
        """The mixtures of a whole run: until which share of it, and the share of each text beside --data in it."""
        return [(1.0, self.shares())]

    def shares(self) -> dict[str, float]:
        """Of all tokens, those of each text beside --data, as the user named them."""
        if self.replay is None:
            return {}
        return {self.replay: REPLAYED if self.replay_share is None else self.replay_share}

    def new_share(self) -> float:
        """Of all tokens of this part of the run, those of --data."""
        begins, ends = self.part
        new, done = 0.0, begins
        for until, shares in self.phases():
            border = min(max(until, begins), ends)
            new += (border - done) * (1 - math.fsum(shares.values()))
            done = border
        return new / (ends - begins)


def _warn_of_many_passes(name: str, tokens: int, text: Data) -> None:
    if (passes := tokens / text.num_training_tokens) > MANY_PASSES:
        say(f"warning: that is {passes:.1f} times all of {name}, {text.num_training_tokens:,} tokens")


def start_over(model: nn.Module) -> None:
    """Gives a model, in place, weights as its architecture draws them; what was pruned stays zero."""
    from transformers import AutoModelForCausalLM

    from overhaul.layers.masked import MaskedLinear

    inner: Any = model
    model.load_state_dict(AutoModelForCausalLM.from_config(inner.config).state_dict())
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            module.enforce()


def _key(windows: Mix, phase: int, sources: Mapping[str, Source]) -> str:
    """What the balance of a mixture in a phase is kept under."""
    shares = windows.phases[phase].shares
    return "mixture of " + ", ".join(f"{shares.get(name, 0):g} {source.key}" for name, source in sources.items())
