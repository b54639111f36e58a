"""Distillation as Minitron uses it (Muralidharan et al., 2024) on a real model: what it claims, at this size.

SmolLM2-135M with two thirds of its MLP neurons, cut by `shrink minitron`, on passages of Wikipedia. Four students see
the same tokens in the same order under the same schedule: one learns the original's predictions, one those of the
original after it read the text too (teacher correction), one the text, and one of the same shape begins at random. All
have one learning rate, which was not tuned for any of them. They are judged on that corpus and on two others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from overhaul import artifact, evaluate, machine
from overhaul.adapt.full import Full
from overhaul.artifact import Artifact
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.distill.kd import KnowledgeDistillation
from overhaul.divergence import TeacherLinear, linear_divergence, top_words
from overhaul.interop import hf
from overhaul.schedules import schedule
from overhaul.shrink.minitron import Minitron
from overhaul.train import Plan, train
from overhaul.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

CORPUS = "boolq-passages"
SEEDS = (0, 1, 2)
STEPS, BATCH_SIZE, SEQ_LEN, LR = 32, 2, 256, 3e-4
CORRECTION_LR = 1e-4
FFN, SAMPLES = 1024, 32
ELSEWHERE = ("sample", "manpages-en")
"""Corpora that no student was trained on: novels and manual pages."""
HELDOUT_WINDOWS = 32
DTYPE = machine.compute_dtype("auto", torch.device("cpu"))
HOW: dict[str, Any] = {
    "steps": STEPS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "lr": LR, "schedule": "cosine", "save_every": 0,
}  # fmt: skip
SETTINGS = {
    "model": "smollm2-135m", "corpus": CORPUS, **HOW, "ffn": FFN, "samples": SAMPLES,
    "heldout": f"{HELDOUT_WINDOWS}x{SEQ_LEN}", "dtype": str(DTYPE), "correction_lr": CORRECTION_LR,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bench:
    """The original, and the text."""

    dense: Artifact
    data: Callable[[int], Data]
    heldout_NT: dict[str, Tensor]

    def loss(self, model: nn.Module, corpus: str = CORPUS) -> float:
        """Held-out loss in nats a token."""
        windows_NT = self.heldout_NT[corpus]
        return math.log(evaluate.perplexity(model, windows_NT, dtype=DTYPE, batch_size=4).estimate.value)

    def losses(self, model: nn.Module) -> dict[str, float]:
        """That on every corpus."""
        return {corpus: self.loss(model, corpus) for corpus in self.heldout_NT}

    def student(self, seed: int) -> nn.Module:
        """The cut original; calibration text depends on the seed."""
        work = Workspace(
            data=self.data(seed), dtype=DTYPE, path=self.dense.path, weights_sha256=self.dense.weights_sha256
        )
        machine.seed_everything(seed)
        with torch.no_grad():
            return Minitron(ffn=FFN, samples=SAMPLES, seq_len=SEQ_LEN).run(self.dense.model, work)

    def trained(self, plan: Plan, settings: Any, seed: int) -> nn.Module:
        """The model after a plan."""
        machine.seed_everything(seed)
        train(plan, settings, seed=seed, dtype=DTYPE, quiet=True)
        return plan.finish(plan.model.eval())

    def corrected(self, seed: int, directory: Path) -> Path:
        """The original after as many tokens of the text as a student sees, the same ones."""
        settings = Full(**{**HOW, "lr": CORRECTION_LR})
        model = self.trained(settings.plan(copy.deepcopy(self.dense.model), self.data(seed)), settings, seed)
        model.save_pretrained(directory)
        self.dense.processor.save_pretrained(directory)
        return directory


@pytest.fixture(scope="module")
def bench(smol: Path) -> Bench:
    dense = artifact.load(smol, dtype=machine.weights_dtype(DTYPE))
    corpus = open_corpus(CorpusSpec(path=CORPUS))

    def data(seed: int) -> Data:
        return Data(corpus, dense.processor, seed)

    texts = {CORPUS: data(0)} | {
        name: Data(open_corpus(CorpusSpec(path=name)), dense.processor, 0) for name in ELSEWHERE
    }
    heldout_NT = {name: text.windows("heldout", seq_len=SEQ_LEN, limit=HELDOUT_WINDOWS) for name, text in texts.items()}
    return Bench(dense, data, heldout_NT)


@pytest.fixture(scope="module")
def students(bench: Bench) -> dict[int, nn.Module]:
    """The cut of each seed."""
    return {seed: bench.student(seed) for seed in SEEDS}


@pytest.fixture(scope="module")
def all_losses(
    bench: Bench, students: dict[int, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, float]]]:
    """Held-out losses by seed: of the original, the cut, and what each way to train makes of the cut's shape."""
    found: dict[str, list[dict[str, float]]] = {"teacher": [bench.losses(bench.dense.model)] * len(SEEDS)}
    for seed in SEEDS:
        student, data = students[seed], bench.data(seed)
        method = KnowledgeDistillation(teacher=str(bench.dense.path), **HOW)
        corrected = bench.corrected(seed, tmp_path_factory.mktemp("corrected"))
        follows = method.model_copy(update={"teacher": str(corrected)})
        found.setdefault("corrected", []).append(bench.losses(artifact.load(corrected).model))
        # Made when their turn comes: each holds a model, its gradients and optimizer.
        plans: dict[str, Callable[[], Plan]] = {
            "kd": partial(method.plan, copy.deepcopy(student), data),
            "kd-corrected": partial(follows.plan, copy.deepcopy(student), data),
            "clm": partial(_on_text, copy.deepcopy(student), data, method),
            "scratch": partial(_on_text, _random_twin(student, seed), data, method),
        }
        found.setdefault("cut", []).append(bench.losses(student))
        for name in list(plans):
            found.setdefault(name, []).append(bench.losses(bench.trained(plans.pop(name)(), method, seed)))
    for corpus in bench.heldout_NT:
        place = "" if corpus == CORPUS else f" on {corpus}"
        results.record(
            Row(id=f"distill-kd/loss-{name}{place.replace(' on ', '-')}", kind="claim", unit="nats",
                what=f"Held-out loss{place}, {_TOLD[name]}",
                values=tuple(one[corpus] for one in values), seeds=SEEDS, settings=SETTINGS)
            for name, values in found.items()
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def losses(all_losses: dict[str, list[dict[str, float]]]) -> dict[str, list[float]]:
    """Those on the corpus that was trained on."""
    return {name: [one[CORPUS] for one in values] for name, values in all_losses.items()}


_TOLD = {
    "teacher": "original",
    "corrected": "original, corrected",
    "cut": "two thirds of the neurons, not trained",
    "kd": "two thirds of the neurons, trained on the original's predictions",
    "kd-corrected": "two thirds of the neurons, trained on the corrected original's predictions",
    "clm": "two thirds of the neurons, trained on the text",
    "scratch": "the same shape from random weights, trained on the text",
}


def _on_text(model: nn.Module, data: Data, method: KnowledgeDistillation) -> Plan:
    """Cross-entropy in place of the divergence; everything else is the method's."""
    plan = Full(**HOW).plan(model, data)
    return replace(plan, schedule=schedule(method.schedule, method.warmup, method.floor))


def _random_twin(student: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(student.config), dtype=torch.float32)


def test_predictions_teach_more_than_the_text(losses):
    _check(
        id="distill-kd/ahead-of-text", what="Held-out loss of the student of the text less that of the distilled one",
        target=Target(">", 0), values=tuple(clm - kd for clm, kd in zip(losses["clm"], losses["kd"], strict=True)),
    )  # fmt: skip


def test_predictions_of_a_corrected_teacher_teach_more_than_the_text(losses):
    """As the paper does it: a teacher that has read the students' text itself (Sreenivas et al., 2024, section 2)."""
    pairs = zip(losses["clm"], losses["kd-corrected"], strict=True)

    _check(
        id="distill-kd/ahead-of-text-corrected", target=Target(">", 0),
        what="Held-out loss of the student of the text less that of the one distilled from the corrected original",
        values=tuple(clm - kd for clm, kd in pairs),
    )  # fmt: skip


@pytest.mark.parametrize("corpus", ELSEWHERE)
def test_predictions_teach_more_than_the_text_where_the_text_is_another(all_losses, corpus):
    """A student of the text also learns what is peculiar to it, which the teacher never knew."""
    pairs = zip(all_losses["clm"], all_losses["kd"], strict=True)

    _check(
        id=f"distill-kd/ahead-of-text-{corpus}", target=Target(">", 0),
        what=f"Held-out loss on {corpus} of the student of the text less that of the distilled one",
        values=tuple(clm[corpus] - kd[corpus] for clm, kd in pairs),
    )  # fmt: skip


def test_a_cut_is_worth_more_than_random_weights(losses):
    pairs = zip(losses["scratch"], losses["clm"], strict=True)

    _check(
        id="distill-kd/ahead-of-scratch", what="Held-out loss from random weights less that from the cut, on the text",
        target=Target(">", 1), values=tuple(scratch - clm for scratch, clm in pairs),
    )  # fmt: skip


@pytest.mark.parametrize("known", [16, 64, 256])
def test_few_words_hold_most_of_the_divergence(bench, students, known):
    shares = []
    for student in students.values():
        with torch.no_grad():
            batch = {"input_ids": bench.heldout_NT[CORPUS][:4]}
            own_ND, theirs_NE = (hf.hidden_states(m, batch).flatten(0, 1) for m in (student, bench.dense.model))
            own, theirs = hf.head(student), hf.head(bench.dense.model)
            assert own is not None
            assert theirs is not None
            teacher = TeacherLinear(theirs_NE, theirs.weight)
            words = top_words(teacher, known, num_words=len(own.weight))
            part, whole = (linear_divergence(own_ND, own.weight, of) for of in (words, teacher))
        shares.append(float(part / whole))

    _check(
        id=f"distill-kd/top-{known}", unit="share", values=tuple(shares), target=Target(">=", 0.5),
        what=f"Share of the divergence of the cut that the teacher's {known} likeliest words hold",
    )  # fmt: skip


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(Row(**{"kind": "claim", "unit": "nats", "seeds": SEEDS, "settings": SETTINGS, **fields}))
