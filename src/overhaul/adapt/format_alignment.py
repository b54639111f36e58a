"""Mix-CPT, stage two: a chat format, learnt on few examples whose answers the model knows (Jiang et al., 2025)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from overhaul.adapt.full import Full
from overhaul.method import Fraction, PeakRate, Positive, Steps

if TYPE_CHECKING:
    from torch import nn

    from overhaul.corpora import Corpus
    from overhaul.data import Data
    from overhaul.stream import Stream
    from overhaul.train import Plan


class FormatAlignment(Full):
    """Train the chat format alone, on few examples whose answers the model knows already.

    Each example's answer is scored as plain text and in the chat template. An answer that is likely without the
    template, and no less likely within it, holds nothing to learn but the format.
    """

    paper: ClassVar[str] = (
        "Jiang, Li, Zhao, Song, Zhang, Wen: Mix-CPT: A Domain Adaptation Framework via Decoupling Knowledge Learning "
        "and Format Alignment, ICLR 2025, arXiv:2407.10804"
    )

    select: Positive = Field(100, description="Examples that are trained on.")
    by: Literal["fas", "loss", "random"] = Field(
        "fas", description="How they are chosen: known answers that the template changes least, known answers, or any."
    )
    pool: Fraction = Field(
        0.5, description="Of the examples, those with the lowest plain loss, among which fas chooses."
    )
    candidates: Positive = Field(500, description="Examples that are scored at most; of more, so many drawn by --seed.")
    count_end: bool = Field(False, description="Count the end of the turn, too, in the loss within the template.")
    template: str | None = Field(
        None, description="Chat template, a jinja file; it is written into the output. Otherwise the model's own."
    )
    steps: Steps = 50
    lr: PeakRate = 2e-5

    @field_validator("template")
    @classmethod
    def _from_anywhere(cls, path: str | None) -> str | None:
        """The record can be replayed from any directory."""
        return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().exists() else path

    @model_validator(mode="after")
    def _counts_steps(self) -> FormatAlignment:
        if self.epochs is not None:
            raise ValueError(
                f"epochs {self.epochs:g} would be passes over all of --data, of which {self.select} examples are "
                "trained on; use steps"
            )
        return self

    @model_validator(mode="after")
    def _scores_as_many_as_it_takes(self) -> FormatAlignment:
        if self.select > self.candidates:
            raise ValueError(
                f"select {self.select} of {self.candidates} candidates: fewer are scored than are to be chosen; use "
                f"candidates {self.select}, or more, from which there is something to choose"
            )
        return self

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Gives the tokenizer its template, before anything is measured with it, and looks for one example.

        Raises:
            UserError: no template, or no question with an answer.
        """
        from overhaul.alignment import candidates, use_template

        if data is not None:
            use_template(data, self.template)
            candidates(data, seq_len=self.seq_len, limit=1)

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """All parameters, on the chosen examples.

        Raises:
            UserError: no template, or no question with an answer.
        """
        from overhaul.alignment import TEMPLATE, SameChoice, use_template
        from overhaul.journal import note_text

        written = use_template(data, self.template)
        if written is not None:
            note_text(TEMPLATE, written)
        chosen = self.choice(model, data)
        plan = super().plan(model, replace(data, corpus=chosen))
        same = SameChoice(f"{chosen.fingerprint} {data.tokenizer.chat_template}")
        return replace(plan, watchers=(*plan.watchers, same))

    def stream(self, data: Data) -> Stream:
        """Each example alone in a window; of it the answers and the ends of their turns are trained on."""
        return data.examples(self)

    def choice(self, model: nn.Module, data: Data) -> Corpus:
        """The corpus with the chosen examples for its training text, as conversations; says and notes the choice.

        Raises:
            UserError: no row is a question with an answer, or all are longer than `seq_len`.
        """
        from overhaul.alignment import candidates, choose, score
        from overhaul.journal import note_table
        from overhaul.progress import say
        from overhaul.split import fingerprint

        found = candidates(data, seq_len=self.seq_len, limit=self.candidates, with_end=self.count_end)
        if len(found) < self.select:
            say(f"note: {data.corpus.name} has {len(found)} examples, fewer than --select {self.select}: all are taken")
        scores = score(model, found, dtype=data.dtype)
        chosen = choose(scores, self.select, by=self.by, pool=self.pool, seed=data.seed)
        title = f"{len(chosen)} of {len(found)} examples were chosen by {self.by}"
        shown = scores.table(chosen)
        note_table(title, ("what", "chosen", "all"), shown)
        say("\n".join([title, *(f"  {what}: {those}, of all {every}" for what, those, every in shown[1:])]))
        train, corpus = tuple(found[number].row for number in chosen), data.corpus
        return replace(corpus, train=train, fingerprint=fingerprint((train, corpus.calib, corpus.heldout)))
