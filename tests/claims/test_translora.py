"""Trans-LoRA (Wang et al., 2024) on a real model: what a transfer without the data recovers; the worth of the filter.

Source: SmolLM2-135M with LoRA, trained on a generated task whose answers can be checked. Target: the same model with a
tenth of its layers cut out, which writes the prompts. The target is trained equally long on every set of prompts, the
data itself among them. One learning rate, which was not tuned for any of them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import checkable, results
from bench.results import Row, Target
from torch import nn

from overhaul import artifact, authenticity, machine
from overhaul.adapt.bundling import Bundling
from overhaul.adapt.lora import LoRA
from overhaul.artifact import Artifact
from overhaul.bundle import JUDGE, Bundle, Example
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.discrepancy import Sums, mmd2
from overhaul.generation import mean_states
from overhaul.interop.peft import write_adapter
from overhaul.options import Options
from overhaul.shrink.minitron import Minitron
from overhaul.train import train
from overhaul.transfer import Teaching, learnt, right_share
from overhaul.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600), pytest.mark.filterwarnings("ignore")]  # of peft's own

TASKS = ("boolean", "sorting")
ABLATED = TASKS[0]
"""The task on which all sets of prompts are compared."""
SEEDS = (0, 1, 2)
ROWS, TESTED = 200, 160
WRITTEN, KEPT = 400, 100
OFF_TASK = 0.3
"""Share of the prompts of a corrupted generator that are no prompts of the task."""
LAYERS = 27
DTYPE = machine.compute_dtype("auto", torch.device("cpu"))
HOW: dict[str, Any] = {"steps": 40, "batch_size": 8, "lr": 1e-3, "rank": 16, "seq_len": 128, "save_every": 0}
JUDGED: dict[str, Any] = {"rows": 100, "steps": 40, "lr": 5e-4}
SETTINGS = {
    "source": "smollm2-135m", "target_layers": LAYERS, **HOW, "judge": JUDGED, "rows": ROWS, "written": WRITTEN,
    "kept": KEPT, "tested": TESTED, "dtype": str(DTYPE),
}  # fmt: skip

Rows = Sequence[tuple[str, str, float | None]]


@dataclass(frozen=True, slots=True)
class Found:
    """One task with one seed: shares of right answers, and what is known of the prompts."""

    right: dict[str, float]
    mmd2: dict[str, float]
    auroc: float
    accepted: int


@pytest.fixture(scope="module")
def target(smol: Path) -> Artifact:
    """The source with a tenth of its layers cut out."""
    made = artifact.load(smol, dtype=machine.weights_dtype(DTYPE))
    work = _work(made, Data(open_corpus(CorpusSpec(path="sample")), made.processor))
    with torch.no_grad():
        model = Minitron(layers=LAYERS, samples=32, seq_len=256).run(made.model, work)
    return replace(made, model=model)


@pytest.fixture(scope="module")
def found(smol: Path, target: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Found]]:
    """What came out for a task, one for each seed, once it is asked for; all of it is recorded."""

    @lru_cache
    def of(task: str) -> list[Found]:
        made = [_Transfer(task, seed, smol, target, tmp_path_factory.mktemp(f"{task}-{seed}")).run() for seed in SEEDS]
        results.record(
            Row(id=f"adapt-translora/{task}-{name}", kind="claim", unit="share", seeds=SEEDS, settings=SETTINGS,
                what=f"Right answers, task {task}: {_TOLD[name]}", values=tuple(one.right[name] for one in made))
            for name in made[0].right
        )  # fmt: skip
        accepted = f"Prompts that the judge accepts, of {WRITTEN} written, {KEPT} at most, task {task}"
        results.record([
            Row(id=f"adapt-translora/{task}-accepted", kind="claim", unit="", seeds=SEEDS, settings=SETTINGS,
                what=accepted, values=tuple(float(one.accepted) for one in made))
        ])  # fmt: skip
        return made

    return of


_TOLD = {
    "source": "source with its adapter",
    "before": "target as it is",
    "labels": "source with its adapter, on accepted prompts that have a right answer",
    "on-task": "share of the accepted prompts that have one",
    "real": "target trained on the data",
    "filtered": "target trained on what the judge accepts",
    "random-text": "target trained on any text as prompts",
    "seeds": "target trained on the five examples",
    "corrupted-filtered": "target trained on what the judge accepts of a corrupted generator",
    "corrupted-unfiltered": "target trained on what a corrupted generator writes",
}


class _Transfer:
    """One task with one seed. Prompts are written and answered once, for all sets that are compared."""

    def __init__(self, task: str, seed: int, smol: Path, target: Artifact, folder: Path) -> None:
        self.task, self.seed, self.target, self.folder = task, seed, target, folder
        rows = checkable.examples(task, ROWS + TESTED, seed=seed)
        self.test = tuple(Example(*row) for row in rows[ROWS:])
        self.data = checkable.write(folder / "private.jsonl", rows[:ROWS])
        self.bundle = self._bundle(smol)
        parameter = next(target.model.parameters())
        self.teaching = Teaching(self.bundle, target.processor, DTYPE, seed, parameter)

    def _bundle(self, smol: Path) -> Bundle:
        """Phase A: the adapter is trained as anyone would, then the bundle is made."""
        source = artifact.load(smol, dtype=machine.weights_dtype(DTYPE))
        lora = LoRA(**HOW)
        machine.seed_everything(self.seed)
        data = Data(open_corpus(self.data), source.processor, self.seed)
        train(lora.plan_on(source.model, data.examples(lora)), lora, seed=self.seed, dtype=DTYPE, quiet=True)
        adapter = self.folder / "adapter"
        adapter.mkdir()
        write_adapter(source.model, source.path, adapter)
        options = Options(data=str(self.data), seed=self.seed)
        return Bundling(**JUDGED).make(str(adapter), self.folder / "bundle", options)

    def run(self) -> Found:
        """Phase B with every set of prompts; the data is read for the control only."""
        pool = self.teaching.written(
            self.target.model, WRITTEN, budget=3 * WRITTEN, threshold=None, temperature=1.0, top_p=0.95
        )
        scored = [(prompt, score or 0.0) for prompt, score in zip(pool.prompts, pool.scores, strict=True)]
        sets = {"filtered": self._accepted(scored), "real": None}
        if self.task == ABLATED:
            corrupted = self._corrupted(pool.prompts)
            judged = list(zip(corrupted, self._scores(corrupted), strict=True))
            sets |= {
                "corrupted-filtered": self._accepted(judged),
                "corrupted-unfiltered": corrupted[:KEPT],
                "seeds": [seed.prompt for seed in self.bundle.seeds],
                "random-text": list(self.teaching.random_text(open_corpus(CorpusSpec(path="sample")), KEPT).prompts),
            }
        asked = list(dict.fromkeys(prompt for prompts in sets.values() if prompts for prompt in prompts))
        said, source = self.teaching.answers(asked, self.test, own=None)
        answers = dict(zip(asked, said, strict=True))
        right = {"source": source, "before": self._right(self.target.model)}
        kept = sets["filtered"] or []
        answerable = {prompt: answer for prompt in kept if (answer := checkable.answer(self.task, prompt))}
        right["on-task"] = len(answerable) / len(kept)
        right["labels"] = float(np.mean([answers[prompt].strip() == answer for prompt, answer in answerable.items()]))
        for name, prompts in sets.items():
            right[name] = self._right(self._trained(self._rows(prompts, answers)))
        corrupt = {name: prompts for name, prompts in sets.items() if prompts and name.startswith("corrupted")}
        return Found(right, self._distances(corrupt), self.bundle.judge["auroc"], len(kept))

    def _rows(self, prompts: Sequence[str] | None, answers: dict[str, str]) -> Rows:
        """Prompts with the teacher's answers, or the data with its own."""
        if prompts is None:
            made = self.teaching.real(open_corpus(self.data), KEPT)
            assert made.answers is not None
            return [(prompt, answer, None) for prompt, answer in zip(made.prompts, made.answers, strict=True)]
        return [(prompt, answers[prompt], None) for prompt in prompts if answers[prompt].strip()]

    def _scores(self, prompts: Sequence[str]) -> np.ndarray:
        judge = self.teaching.load(str(self.bundle.path / JUDGE))
        return authenticity.scores(judge.model, judge.processor, prompts, dtype=DTYPE)

    def _accepted(self, scored: Sequence[tuple[str, float]]) -> list[str]:
        return [prompt for prompt, score in scored if score > self.bundle.judge["threshold"]][:KEPT]

    def _corrupted(self, prompts: Sequence[str]) -> list[str]:
        """The prompts with a share of them replaced by pieces of novels."""
        draw, corpus = random.Random(self.seed), open_corpus(CorpusSpec(path="sample"))
        others = self.teaching.random_text(corpus, len(prompts)).prompts
        return [other if draw.random() < OFF_TASK else own for own, other in zip(prompts, others, strict=True)]

    def _trained(self, rows: Rows) -> nn.Module:
        lora, model = LoRA(**HOW), copy.deepcopy(self.target.model)
        machine.seed_everything(self.seed)
        data = Data(learnt(rows, self.bundle), self.target.processor, self.seed)
        _work(self.target, data).train(lora.plan_on(model, data.examples(lora)), lora)
        return model

    def _right(self, model: nn.Module) -> float:
        return right_share(model, self.target.processor, self.test, self.bundle, DTYPE)

    def _distances(self, sets: dict[str, list[str]]) -> dict[str, float]:
        base, features = self.teaching.load(self.bundle.base.path), self.bundle.features
        return {
            name: mmd2(
                Sums.of(features(mean_states(base.model, base.processor, prompts, dtype=DTYPE))), self.bundle.real
            )
            for name, prompts in sets.items()
        }


def _work(made: Artifact, data: Data) -> Workspace:
    return Workspace(data=data, dtype=DTYPE, path=made.path, weights_sha256=made.weights_sha256)


@pytest.mark.parametrize("task", TASKS)
def test_most_of_what_the_data_would_give_is_recovered(found, task):
    """(transferred - before) / (trained on the data - before), where training on the data gives anything."""
    shares = []
    for one in found(task):
        gain = one.right["real"] - one.right["before"]
        assert gain > 0.1, "the data itself teaches the target nothing: the task is no test"
        shares.append((one.right["filtered"] - one.right["before"]) / gain)

    _check(
        id=f"adapt-translora/{task}-recovered", target=Target(">=", 0.6), values=tuple(shares),
        what=f"Of the gain that the data gives the target on task {task}, what the transfer gives",
    )  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_target_gains(found, task):
    _check(
        id=f"adapt-translora/{task}-gain", target=Target(">", 0.1),
        what=f"Right answers on task {task}: target after the transfer less before",
        values=tuple(one.right["filtered"] - one.right["before"] for one in found(task)),
    )  # fmt: skip


def test_the_judge_tells_real_from_written(found):
    _check(
        id="adapt-translora/auroc", target=Target(">", 0.8), unit="",
        what=f"AUROC of the judge, task {ABLATED}", values=tuple(one.auroc for one in found(ABLATED)),
    )  # fmt: skip


def test_the_filter_helps_against_a_corrupted_generator(found):
    _check(
        id="adapt-translora/filter-worth", target=Target(">=", 0.03),
        what=f"Right answers on task {ABLATED}, {OFF_TASK:.0%} of the prompts off it: filtered less unfiltered",
        values=tuple(one.right["corrupted-filtered"] - one.right["corrupted-unfiltered"] for one in found(ABLATED)),
    )  # fmt: skip


def test_filtered_prompts_are_nearer_to_the_data(found):
    _check(
        id="adapt-translora/filter-distance", target=Target(">", 0), unit="",
        what=f"MMD^2 from the data, task {ABLATED}, {OFF_TASK:.0%} of the prompts off it: unfiltered less filtered",
        values=tuple(one.mmd2["corrupted-unfiltered"] - one.mmd2["corrupted-filtered"] for one in found(ABLATED)),
    )  # fmt: skip


@pytest.mark.parametrize("less", ["seeds", "random-text"])
def test_filtered_prompts_teach_more(found, less):
    """The mean over the seeds counts, as with the orders of the paper's tables; two points are a tie."""
    gains = [one.right["filtered"] - one.right[less] for one in found(ABLATED)]

    _check(
        id=f"adapt-translora/ahead-of-{less}", target=Target(">", -0.02), values=(float(np.mean(gains)),),
        what=f"Right answers on task {ABLATED}, mean of {len(SEEDS)} seeds: filtered prompts less {less}",
    )  # fmt: skip


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(Row(**{"kind": "claim", "unit": "share", "seeds": SEEDS, "settings": SETTINGS, **fields}))
