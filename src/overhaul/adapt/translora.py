"""Phase B of Trans-LoRA (Wang et al., 2024): an adapter is trained anew on another model, without its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from overhaul.adapt.bundling import USELESS
from overhaul.adapt.lora import LoRA
from overhaul.adapt.randlora import RandLoRA
from overhaul.adapt.vera import VeRA
from overhaul.errors import UserError
from overhaul.method import BatchSize, Fraction, PeakRate, Pipeline, Positive, Rate, Steps
from overhaul.progress import say

if TYPE_CHECKING:
    from torch import nn

    from overhaul.adapt.increments import Increments
    from overhaul.bundle import Bundle
    from overhaul.data import Data
    from overhaul.transfer import Synthetic
    from overhaul.workspace import Workspace

KINDS = {"lora": LoRA, "randlora": RandLoRA, "vera": VeRA}
SAME_ANSWER = 0.9
"""A teacher with one answer for more than this share of prompts, or with none, teaches nothing."""
FEW = 10
"""Answers below which it is no wonder that they are the same."""


class TransLoRA(Pipeline):
    """Train an adapter anew on another model, from a bundle that was made while its data was there.

    The model writes prompts of the task after the bundle's examples, the judge keeps those that look real, the old
    adapter on its old model answers them, and the new one learns the answers: as text, so that the two models may
    have different tokenizers. The data is not needed, and not read.
    """

    paper: ClassVar[str] = (
        "Wang, Ghosh, Cox, Antognini, Oliva, Feris, Karlinsky: Trans-LoRA: towards data-free Transferable Parameter "
        "Efficient Finetuning, NeurIPS 2024, arXiv:2405.17258"
    )

    bundle: str = Field(min_length=1, description="What `overhaul bundle` wrote.")
    prompts: Literal["filtered", "unfiltered", "random-text", "seeds", "real"] = Field(
        "filtered",
        description="What is learnt from; the others are controls: every prompt that was written, lines of --data or "
        "of the sample, the bundle's examples alone, or the rows of --data with their own answers.",
    )
    generator: Literal["target", "source"] = Field("target", description="Which model writes the prompts.")
    samples: Positive | None = Field(None, description="Prompts to keep; as many as the data had rows when not given.")
    budget: Positive = Field(10, description="Prompts written at most, for each one to keep.")
    threshold: Fraction | None = Field(None, description="Judge's score above which a prompt is kept; the bundle's.")
    temperature: Rate = Field(1.0, description="Of the prompts that are written.")
    top_p: float = Field(0.95, gt=0, le=1, description="They are drawn from the likeliest words of this share.")
    test: str | None = Field(
        None, description="File with held-out prompts and answers, on which source and target are compared."
    )
    adapter: Literal["lora", "randlora", "vera"] = Field("lora", description="Kind of the new adapter.")
    rank: Positive | None = Field(None, description="Rank of the new adapter; its kind's own when not given.")
    targets: tuple[str, ...] = Field(
        (), description="Ends of layer names; none means every linear layer of the blocks."
    )
    merge: bool = Field(True, description="Write a merged model; otherwise a PEFT adapter directory.")
    steps: Steps = 300
    batch_size: BatchSize = 8
    seq_len: int = Field(512, gt=1, description="Tokens of a prompt with its answer at most; longer ones are left out.")
    lr: PeakRate | None = Field(None, description="Peak learning rate; that of the new adapter's kind when not given.")

    @field_validator("bundle", "test")
    @classmethod
    def _from_anywhere(cls, path: str | None) -> str | None:
        """The record can be replayed from any directory."""
        return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().exists() else path

    @model_validator(mode="after")
    def _kind_fits(self) -> TransLoRA:
        self._trained()  # the kind's own rules
        return self

    def others(self) -> tuple[str, ...]:
        """The teacher, and the model that the judge stands on."""
        bundle = self._bundle()
        bundle.refuse_missing()
        return tuple(dict.fromkeys((bundle.teacher_path, bundle.base.path)))

    def reads_data(self) -> bool:
        """Only some controls do."""
        return self.prompts in ("random-text", "real")

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Looks at every part of the bundle, at the target's layers and context, and at the data that is not asked for.

        Raises:
            UserError: a part is not as it was written, or does not fit.
        """
        from overhaul.generation import longest
        from overhaul.layers.lora import refuse_pruned
        from overhaul.select import select_linears
        from overhaul.transfer import say_trained_on

        assert data is not None
        bundle = self._bundle()
        bundle.check()
        names = select_linears(model, self.targets)
        if self.merge == (self.adapter == "lora"):  # LoRA would fill zeros when merged, the others when kept apart
            refuse_pruned(model, names)
        if self._writes():
            self._refuse_short_generator(model, data.tokenizer, bundle)
        if self.seq_len > (most := longest(model)):
            given = f"--seq-len {self.seq_len} is more than the target reads"
            raise UserError(given, allowed=f"up to {most}", hint=f"--seq-len {most}")
        if self.test:
            say_trained_on(self.test, bundle)
        if data.corpus.fingerprint == bundle.statistics["fingerprint"] and self.prompts != "real":
            told = "prompts are cut out of it" if self.reads_data() else "nothing is learnt from it or measured on it"
            say(f"warning: --data {data.corpus.name} is the private data that a transfer does without: {told}")
        if self.prompts == "filtered" and bundle.judge["auroc"] < USELESS:
            say(f"warning: the judge's AUROC is {bundle.judge['auroc']:.2f}: the filter is uninformative")

    def _refuse_short_generator(self, model: nn.Module, tokenizer: Any, bundle: Bundle) -> None:
        """Raises `UserError` where the model that writes the prompts cannot read the examples; loads no weights."""
        from overhaul.artifact import read_config, read_tokenizer
        from overhaul.generation import longest, longest_of
        from overhaul.prompts import refuse_short_context

        most, other = longest(model), "source"
        if self.generator == "source":
            most, other = longest_of(read_config(bundle.base.path)), "target"
            tokenizer = read_tokenizer(bundle.base.path)
        hint = f"--generator {other}, or a bundle with fewer --seeds"
        refuse_short_context(most, tokenizer, bundle.seeds, bundle.frame, f"the {self.generator}", hint=hint)

    def outline(self, model: nn.Module) -> tuple[str, ...]:
        """What would be written, kept, answered and learnt."""
        bundle = self._bundle()
        wanted = self._wanted(bundle)
        auroc = f"a judge with AUROC {bundle.judge['auroc']:.2f}"
        written = (
            f"{wanted} prompts ({self.prompts}), of at most {self.budget * wanted} that the {self.generator} writes"
        )
        made = {
            "filtered": (written, f"kept above {self._threshold(bundle):.2f} of {auroc}"),
            "unfiltered": (written, f"all kept, and scored by {auroc}"),
            "random-text": (f"{wanted} pieces of text (random-text), not judged",),
            "seeds": (f"{len(bundle.seeds)} examples of the bundle (seeds), not judged",),
            "real": (f"{wanted} rows of the data at most (real), not judged",),
        }[self.prompts]
        answers = "their own answers" if self.prompts == "real" else f"answers of {bundle.teacher_path}"
        return (*made, answers, f"{self.steps} steps of adapt {self.adapter} on {self.batch_size} of them at a time")

    def run(self, model: nn.Module, work: Workspace) -> nn.Module:
        """Prompts, answers, training, and the table of the transfer."""
        from overhaul.artifact import SYNTHETIC
        from overhaul.journal import note_rows, note_table
        from overhaul.transfer import Teaching, learnt, right_share, rows_of

        bundle = self._bundle()
        data, lora = work.data, self._trained()
        teaching = Teaching(bundle, data.tokenizer, work.dtype, data.seed, next(model.parameters()))
        test = rows_of(self.test) if self.test else ()
        made = self._prompts(model, teaching, data)
        answers, teacher_right = teaching.answers(made.prompts, test, own=made.answers)
        rows = [(p, a, s) for p, a, s in zip(made.prompts, answers, made.scores, strict=True) if a.strip()]
        _refuse_empty_teacher(answers)
        before = right_share(model, data.tokenizer, test, bundle, work.dtype)
        corpus = learnt(rows, bundle)
        stream = type(data)(corpus, data.tokenizer, data.seed).examples(lora)
        work.train(lora.plan_on(model, stream), lora)
        after = right_share(model, data.tokenizer, test, bundle, work.dtype)
        note_rows(SYNTHETIC, [{"prompt": p, "completion": a, "score": s} for p, a, s in rows])
        shown = [*made.told, ("answers", f"{len(rows)} of {len(answers)} not empty")]
        title = f"{len(rows)} prompts ({self.prompts}) carried the adapter over"
        if test:
            shown += [
                ("right answers, source with adapter", f"{teacher_right:.1%}"),
                ("right answers, target before", f"{before:.1%}"),
                ("right answers, target after", f"{after:.1%}"),
                ("asked", str(len(test))),
            ]
            title += f": {after:.0%} right answers, the source has {teacher_right:.0%}, the target had {before:.0%}"
        note_table(title, ("what", "value"), shown)
        say("\n".join([title, *(f"  {what}: {value}" for what, value in shown)]))
        return model

    def _prompts(self, model: nn.Module, teaching: Any, data: Data) -> Synthetic:
        """What is learnt from, by --prompts."""
        wanted = self._wanted(teaching.bundle)
        if self.prompts == "seeds":
            return teaching.given([seed.prompt for seed in teaching.bundle.seeds])
        if self.prompts == "real":
            return teaching.real(data.corpus, wanted)
        if self.prompts == "random-text":
            return teaching.random_text(data.corpus, wanted)
        return teaching.written(
            model if self.generator == "target" else None,
            wanted,
            budget=self.budget * wanted,
            threshold=self._threshold(teaching.bundle) if self.prompts == "filtered" else None,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def _bundle(self) -> Bundle:
        from overhaul.bundle import Bundle

        return Bundle.read(self.bundle)

    def _writes(self) -> bool:
        return self.prompts in ("filtered", "unfiltered")

    def _wanted(self, bundle: Bundle) -> int:
        return self.samples or bundle.statistics["rows"]

    def _threshold(self, bundle: Bundle) -> float:
        return bundle.judge["threshold"] if self.threshold is None else self.threshold

    def _trained(self) -> Increments:
        """The training of the new adapter."""
        how: dict[str, Any] = {name: getattr(self, name) for name in ("targets", "merge", "steps", "batch_size")}
        own = {"rank": self.rank, "lr": self.lr}
        how |= {name: value for name, value in own.items() if value is not None}
        return KINDS[self.adapter](**how, seq_len=self.seq_len, save_every=0)


def _refuse_empty_teacher(answers: Sequence[str]) -> None:
    """Raises `UserError` for a teacher from whose answers nothing can be learnt."""
    said = Counter(answer.strip() for answer in answers)
    most, count = said.most_common(1)[0]
    if not any(said) or (len(answers) >= FEW and count > SAME_ANSWER * len(answers)):
        raise UserError(
            f"the teacher answers {most!r} to {count} of {len(answers)} prompts: there is nothing to learn from that",
            hint="--prompts real to see what the data itself would teach",
        )
