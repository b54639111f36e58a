"""What each text of a mixture is worth: the last part of a run without it (Blakeney et al., 2024, section 4.3)."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from overhaul import shares
from overhaul.method import BatchSize, Measure, PeakRate, Positive, SeqLen, Steps
from overhaul.progress import say
from overhaul.shares import Mixture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from overhaul.data import Data
    from overhaul.extend.mixing import Mixing
    from overhaul.shares import Shares
    from overhaul.table import Row, Table

ALL, NO_CHANGE = "all texts", "the mixture before"


class DataUtility(Measure):
    """What each text of a mixture is worth: losses after short runs without it, less those after runs with all.

    The model is trained on a copy, several times; nothing is written. What is left out is shared out over the others.
    """

    paper: ClassVar[str] = (
        "Blakeney, Paul, Larsen, Owen, Frankle: Does your data spark joy? Performance gains from domain upsampling at "
        "the end of training, COLM 2024, arXiv:2406.03476"
    )
    reads_packed: ClassVar[bool] = False

    last_mix: Mixture = Field(
        (), description="The mixture whose texts are left out one by one, as extend upsample; --data has the rest."
    )
    mix: Mixture = Field(
        (), description="The mixture before it: a run that goes on with this one tells what the change itself is worth."
    )
    steps: Steps = 50
    batch_size: BatchSize = 4
    seq_len: SeqLen = 512
    lr: PeakRate = 3e-4
    go_on: bool = Field(
        False, description="Begin each run with the moments and places that extend left in the model's directory."
    )
    runs: Positive = Field(3, description="Runs of each mixture, in other orders: the interval is over these.")
    windows: Positive = Field(16, description="Held-out windows of each text.")

    @model_validator(mode="after")
    def _there_is_a_mixture(self) -> DataUtility:
        if not self.last_mix:
            raise ValueError("last_mix is empty: name the texts and their shares, such as last_mix stdlib=0.5")
        shares.parse(self.mix)
        last = shares.parse(self.last_mix)
        if len(last) == 1 and not shares.above(1, math.fsum(last.values())):
            raise ValueError(f"last_mix has {next(iter(last))} alone: without it nothing is left to train on")
        return self

    def measure(self, model: nn.Module, data: Data) -> Table:
        """Losses without a text less those with all, in nats a token: a row `utility of TEXT on TEXT` for each pair.

        Positive where the text helps. With two runs or more the interval is Student's over the runs, which are paired:
        both of a pair read in the order of one seed.

        Raises:
            UserError: a text is not there, too short, or that of --data; go_on without what it goes on with.
        """
        from dataclasses import replace

        from overhaul.table import Table

        mixtures = self._mixtures(data)
        say(f"{len(mixtures) * self.runs} runs of {self.steps} steps")
        heldout = self._heldout(data)
        # One for each run, whatever the mixture, so that every text is encoded once a run.
        seeded = [replace(data, seed=data.seed + number) for number in range(self.runs)]
        losses = {name: [self._losses(model, one, last, heldout) for one in seeded] for name, last in mixtures.items()}
        rows = [
            self._row(data.model, f"utility of {name} on {text}", [
                without[text] - full[text] for without, full in zip(losses[name], losses[ALL], strict=True)
            ])
            for name in mixtures if name not in (ALL, NO_CHANGE) for text in losses[ALL][0]
        ]  # fmt: skip
        if NO_CHANGE in losses:
            rows += [
                self._row(data.model, f"utility of the change on {text}", [
                    before[text] - full[text] for before, full in zip(losses[NO_CHANGE], losses[ALL], strict=True)
                ])
                for text in losses[ALL][0]
            ]  # fmt: skip
        details = tuple(
            {"mixture": name, "run": number, **loss} for name, of in losses.items() for number, loss in enumerate(of)
        )
        tokens = self.steps * self.batch_size * self.seq_len
        return Table(tuple(rows), details=details, notes=(f"each run read {tokens:,} tokens",))

    def _mixtures(self, data: Data) -> dict[str, Shares]:
        """What is tried: shares of the texts beside --data, by the name of what is left out."""
        last = shares.parse(self.last_mix)
        rest = 1 - math.fsum(last.values())
        found = {ALL: last}
        for left_out, share in last.items():
            others = {path: part / (1 - share) for path, part in last.items() if path != left_out}
            found[data.on(left_out).corpus.name] = others
        if shares.above(rest, 0):
            found[data.corpus.name] = {path: part / (1 - rest) for path, part in last.items()}
        if self.mix:
            found[NO_CHANGE] = shares.parse(self.mix)
        return found

    def _method(self, last: Mapping[str, float]) -> Mixing:
        from overhaul.extend.mixing import Mixing

        settings: dict[str, Any] = self.model_dump(include={"steps", "batch_size", "seq_len", "lr", "go_on"})
        return Mixing(**settings, mix=tuple(f"{path}={share!r}" for path, share in last.items()), save_every=0)

    def _losses(
        self, model: nn.Module, data: Data, last: Mapping[str, float], heldout: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Held-out losses after a run, by text."""
        from overhaul import evaluate, machine, pretrained
        from overhaul.train import train
        from overhaul.workspace import finish

        method = self._method(last)
        if self.go_on:
            method = method.at(pretrained.resolve(data.model))
        trained = copy.deepcopy(model)
        method.check(trained, data)
        machine.seed_everything(data.seed)
        plan = method.plan(trained, data)
        train(plan, method, seed=data.seed, dtype=data.dtype, quiet=True)
        made = finish(plan)
        return {
            name: math.log(evaluate.perplexity(made, windows_NT, dtype=data.dtype).estimate.value)
            for name, windows_NT in heldout.items()
        }

    def _heldout(self, data: Data) -> dict[str, Tensor]:
        """Windows (N, T) of each text's held-out part, by its name."""
        texts = dict.fromkeys([*shares.parse(self.last_mix), *shares.parse(self.mix)])
        return {
            told.corpus.name: told.windows("heldout", seq_len=self.seq_len, limit=self.windows)
            for told in (data, *(data.on(path) for path in texts))
        }

    def _row(self, model: str, metric: str, values: list[float]) -> Row:
        from dataclasses import asdict

        from overhaul.evaluate import mean_over_runs
        from overhaul.table import Row

        return Row(model=model, metric=metric, **asdict(mean_over_runs(values)))
