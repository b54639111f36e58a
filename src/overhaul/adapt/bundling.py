"""Phase A of Trans-LoRA (Wang et al., 2024): what moves an adapter later is made while its data is there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from overhaul.errors import UserError
from overhaul.method import BatchSize, PeakRate, Positive, Rate, Settings, Steps

if TYPE_CHECKING:
    import numpy as np
    import torch

    from overhaul.artifact import Artifact
    from overhaul.bundle import Bundle, Example
    from overhaul.corpora import Corpus
    from overhaul.options import Options
    from overhaul.synthetic import Frame

USELESS = 0.6
"""A judge whose AUROC is below this filters next to nothing: one that guesses has a half."""
FEWEST_HELDOUT = 4
"""Held-out prompts below which nothing can be said of a judge."""
MOST_HELDOUT = 200
"""Held-out prompts that the judge is tried on, and the sums are of: more say nothing new, and as many are written."""
LEDGER_ROWS = 100
"""Written prompts that are compared, word by word, with the data."""


class Bundling(Settings):
    """Keep of an adapter's data what moves the adapter to another model later: a judge, a few examples, sums.

    The source model writes prompts of the task after a few examples. A judge learns to tell them from the real ones;
    it never sees an answer, and needs no knowledge of the model to come. Of the rows only the examples are kept.
    """

    seeds: int = Field(5, ge=2, description="Examples of the data that are kept, and that prompts are written after.")
    rows: Positive = Field(400, description="Real prompts that the judge learns from at most, and as many written.")
    steps: Steps = 100
    batch_size: BatchSize = 8
    lr: PeakRate = 2e-4
    rank: Positive = Field(8, description="Rank of the judge.")
    temperature: Rate = Field(1.0, description="Of the prompts that are written.")
    top_p: float = Field(0.95, gt=0, le=1, description="They are drawn from the likeliest words of this share.")

    def make(self, adapted: str, out: Path, options: Options) -> Bundle:
        """Writes the bundle of an adapter, or of a whole model, into a new directory.

        Raises:
            UserError: the data has no prompts with answers, or too few of them; nothing was written.
        """
        from overhaul import artifact, disk, machine
        from overhaul.bundle import JUDGE, Bundle, Source
        from overhaul.corpora import CorpusSpec, open_corpus

        path, base = artifact.directories(adapted)
        for parent in (path, base):
            artifact.check_out(out, parent=parent)
        if options.data is None:
            raise UserError("bundle needs --data: what the adapter was trained on", allowed="a file or a directory")
        corpus = open_corpus(CorpusSpec(path=options.data, field=options.field))
        task = _Task.of(corpus, self.seeds, options.seed)
        device = machine.pick_device(options.device)
        dtype = machine.compute_dtype(options.dtype, device)
        source = artifact.load(str(base), device=device, dtype=machine.weights_dtype(dtype))
        machine.seed_everything(options.seed)
        made = self._written(source, task, options.seed, dtype)
        with disk.aside(out) as directory:
            sums = _sums(source, task.tried, options.seed, dtype)  # before the judge's adapter is put on
            judge = self._judge(source, task, made, options.seed, dtype, directory / JUDGE)
            bundle = Bundle(
                path=out, base=Source.of(base), teacher=Source.of(adapted), seeds=task.seeds, frame=task.frame,
                judge=judge, statistics=task.statistics(), **sums, ledger=_ledger(task, made),
            )  # fmt: skip
            bundle.write(directory)
        return Bundle.read(out)

    def _written(self, source: Artifact, task: _Task, seed: int, dtype: torch.dtype) -> list[str]:
        """Prompts that the source writes: those that the judge learns to refuse, and those it is tried on."""
        from overhaul.generation import longest
        from overhaul.prompts import Writer, refuse_short_context

        most = longest(source.model)
        refuse_short_context(most, source.processor, task.seeds, task.frame, "the source", hint="fewer --seeds")
        wanted = min(len(task.real), self.rows) + len(task.tried)
        writer = Writer(
            source.model, source.processor, task.seeds, task.frame, longest=task.longest,
            purpose="bundle", seed=seed, temperature=self.temperature, top_p=self.top_p, dtype=dtype,
        )  # fmt: skip
        # Few examples are enough to tell what this model writes, and a small model repeats itself.
        found = writer.several(wanted, budget=4 * wanted, title="prompts")
        if len(found) < 2 * FEWEST_HELDOUT:
            raise UserError(
                f"the source wrote {len(found)} prompts in {writer.sieve.seen} attempts: {writer.sieve.dropped}",
                hint="--temperature 1.2, or another seed for other examples",
            )
        return found

    def _judge(
        self, source: Artifact, task: _Task, made: Sequence[str], seed: int, dtype: torch.dtype, directory: Path
    ) -> dict[str, Any]:
        """Trains the judge, writes its adapter, and says what it is worth on prompts it has not seen."""
        from overhaul import artifact, authenticity
        from overhaul.adapt.lora import LoRA
        from overhaul.interop.peft import write_adapter
        from overhaul.progress import say
        from overhaul.train import train

        device = next(source.model.parameters()).device
        num_heldout = max(FEWEST_HELDOUT, min(len(task.tried), len(made) // 5))
        learnt, unseen = made[num_heldout:], made[:num_heldout]
        count = min(len(task.real), len(learnt), self.rows)  # of both kinds alike
        real = random.Random(seed).sample(task.real, count)
        how: dict[str, Any] = {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr, "rank": self.rank}
        lora = LoRA(**how, alpha=2.0 * self.rank, save_every=0)
        tokenizer = source.processor
        stream = authenticity.judging(tokenizer, real, learnt[:count], batch_size=self.batch_size, seed=seed)
        say(f"the judge learns from {count} real and {count} written prompts")
        train(lora.plan_on(source.model, stream), lora, seed=seed, dtype=dtype)
        directory.mkdir()
        write_adapter(source.model, source.path, directory)
        # Scored as it will be read: merged, in the precision of the base.
        judge = artifact.load(directory, device=device, dtype=next(source.model.parameters()).dtype).model
        yes, no = (authenticity.scores(judge, tokenizer, prompts, dtype=dtype) for prompts in (task.tried, unseen))
        found, at = authenticity.auroc(yes, no), authenticity.best_threshold(yes, no)
        say(f"judge: AUROC {found:.3f} on {len(yes)} real and {len(no)} written prompts it has not seen")
        if found < USELESS:
            say("warning: the filter is uninformative: what the judge lets through is hardly better than the rest")
        return {"auroc": found, "threshold": at, "learnt_of_each": count, "heldout_real": len(yes),
                "heldout_written": len(no), "accepts_real": float((yes > at).mean()),
                "accepts_written": float((no > at).mean()), "generator": "few-shot, source base"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Task:
    """The data as the bundle needs it: prompts to learn from, prompts held out, and the examples.

    Attributes:
        tried: of the held-out prompts, those that are worked with.
    """

    seeds: tuple[Example, ...]
    frame: Frame
    real: list[str]
    heldout: list[str]
    tried: list[str]
    answers: list[str]
    fingerprint: str

    @classmethod
    def of(cls, corpus: Corpus, num_seeds: int, seed: int) -> _Task:
        from overhaul.bundle import example_of
        from overhaul.synthetic import Frame

        rows = [example_of(row, corpus.name) for row in corpus.train]
        real = list(dict.fromkeys(row.prompt for row in rows))
        heldout = list(dict.fromkeys(example_of(row, corpus.name).prompt for row in (*corpus.calib, *corpus.heldout)))
        learnt = set(real)
        heldout = [prompt for prompt in heldout if prompt not in learnt]
        if len(real) < 2 * num_seeds or len(heldout) < FEWEST_HELDOUT:
            raise UserError(
                f"{corpus.name} has {len(real)} different prompts to learn from and {len(heldout)} that are held out",
                allowed=f"{2 * num_seeds} and {FEWEST_HELDOUT} or more",
            )
        first = {row.prompt: row for row in reversed(rows)}
        seeds = tuple(first[prompt] for prompt in random.Random(seed).sample(real, num_seeds))
        tried = heldout
        if len(heldout) > MOST_HELDOUT:
            tried = random.Random(seed).sample(heldout, MOST_HELDOUT)
        answers = [row.answer for row in rows]
        return cls(seeds, Frame.of([*real, *heldout]), real, heldout, tried, answers, corpus.fingerprint)

    @property
    def longest(self) -> int:
        """Characters of the longest prompt, without the frame."""
        return max(len(self.frame.inside(prompt)) for prompt in self.real)

    def statistics(self) -> dict[str, Any]:
        """What of the data as a whole is kept."""
        return {"rows": len(self.answers), "longest_prompt": self.longest,
                "longest_answer": max(map(len, self.answers)),
                "one_line_answers": not any("\n" in text.rstrip() for text in self.answers),
                "fingerprint": self.fingerprint}  # fmt: skip


def _sums(source: Artifact, heldout: Sequence[str], seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel of the discrepancy, and sums over the held-out prompts."""
    from overhaul.discrepancy import Features, Sums, median_distance
    from overhaul.generation import mean_states

    states_ND: np.ndarray = mean_states(source.model, source.processor, heldout, dtype=dtype)
    features = Features(states_ND.shape[1], median_distance(states_ND), seed=seed)
    return {"features": features, "real": Sums.of(features(states_ND))}


def _ledger(task: _Task, made: Sequence[str]) -> dict[str, Any]:
    """What of the data the bundle holds, and how near to the data the source's own writing comes after the examples."""
    from overhaul.synthetic import longest_runs, plain

    inside = task.frame.inside
    kept = {seed.prompt for seed in task.seeds}
    others = [plain(inside(prompt)) for prompt in (*task.real, *task.heldout) if prompt not in kept]
    written = [plain(inside(prompt)) for prompt in made[:LEDGER_ROWS]]
    equal, runs = set(others), longest_runs(written, [text.split() for text in others])
    return {
        "rows_of_data": len(task.seeds),
        "compared_prompts": len(written),
        "equal_to_a_row_share": sum(text in equal for text in written) / len(written),
        "longest_common_run_words": max(runs),
        "mean_common_run_words": sum(runs) / len(runs),
        "also_kept": "what all prompts begin and end with; counts and lengths; the judge's weights; "
        f"sums of random features of {len(task.tried)} held-out prompts",
    }
