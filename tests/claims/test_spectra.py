"""Intruder dimensions (Shuttleworth et al., 2024) on a real model: what the paper claims, at this size.

SmolLM2-135M learns to rewrite orders in a fixed format, by LoRA of rank 1, 8 and 64 (rank-stabilised) and in full, each
as far as it goes, so that all have about one held-out loss on that task: that they do is measured too. What was
forgotten is the loss on the sample corpus, which nobody was trained on.
"""

from __future__ import annotations

import copy
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import Tensor, nn

from overhaul import artifact, evaluate, machine
from overhaul.adapt.full import Full
from overhaul.adapt.lora import LoRA
from overhaul.adapt.repair import Repair
from overhaul.artifact import Artifact
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.layers import merge_all
from overhaul.method import Training
from overhaul.select import block_linears
from overhaul.spectra import Cache, Matrix, look, stable_rank
from overhaul.stored import Stored, stored
from overhaul.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

SEEDS = (0, 1, 2)
K, EPS = 10, 0.5
STEPS, STEPS_OF_A_TASK = 128, 64
"""Of each training, and of each of several tasks in a row; small ones, for intruders grow by steps, not by tokens."""
HOW: dict[str, Any] = {"batch_size": 2, "seq_len": 64, "schedule": "linear", "save_every": 0}
DTYPE = torch.float32
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
HELDOUT = {"task": (12, 128), "sample": (16, 256)}
"""Windows and tokens."""


def trainings() -> dict[str, Training]:
    """The increment is scaled by 2 in every LoRA: alpha / r, and alpha / sqrt(r) at rank 64.

    At the highest rates that still learn the task: at half of them no training of 128 steps brings an intruder.
    """
    steps: dict[str, Any] = {**HOW, "steps": STEPS}
    return {
        "r1": LoRA(rank=1, alpha=2, lr=8e-3, **steps),
        "r8": LoRA(rank=8, alpha=16, lr=5e-3, **steps),
        "r64rs": LoRA(rank=64, alpha=16, rslora=True, lr=1.4e-3, **steps),
        "full": Full(lr=1e-4, **steps),
    }


SETTINGS = {"model": "smollm2-135m", "k": K, "eps": EPS, "steps": STEPS, **HOW, "dtype": str(DTYPE)}
NAMES = ("Ada", "Boris", "Chen", "Dina", "Emil", "Fatima", "Goro", "Hana", "Ivo", "June")
GOODS = ("apples", "bolts", "candles", "drums", "engines", "flutes", "gloves", "hats", "inks", "jars")
CITIES = ("Rome", "Lagos", "Lima", "Oslo", "Quito", "Riga", "Seoul", "Tunis", "Vaduz", "York")


def task_file(path: Path, kind: int = 0, count: int = 300) -> Path:
    """Short instruction and answer pairs; of three kinds of answer."""
    draw = random.Random(kind)

    def pair() -> str:
        name, goods, city, number = draw.choice(NAMES), draw.choice(GOODS), draw.choice(CITIES), draw.randrange(2, 100)
        order = f"{name} from {city} wants {number} {goods}."
        answers = (
            json.dumps({"who": name, "where": city, "what": goods, "count": number}),
            f"<order><count>{number}</count><item>{goods}</item><to>{name}, {city}</to></order>",
            f"ITEM={goods.upper()} | N={number:04d} | SHIP_TO={city.upper()} | FOR={name[0]}.",
        )
        return f"### Order\n{order}\n### Record\n{answers[kind]}"

    path.write_text("\n".join(json.dumps({"text": pair()}) for _ in range(count)) + "\n")
    return path


@dataclass(frozen=True, slots=True)
class Bench:
    """The base, the tasks, general text, and a cache of the base's spectra."""

    dense: Artifact
    base: Stored
    tasks: tuple[Callable[[int], Data], ...]
    heldout_NT: dict[str, Tensor]
    cache: Cache

    def loss(self, model: nn.Module, text: str) -> float:
        """Held-out loss in nats a token."""
        return math.log(evaluate.perplexity(model, self.heldout_NT[text], dtype=DTYPE, batch_size=4).estimate.value)

    def tuned(self, method: Training, seed: int, *, model: nn.Module | None = None, task: int = 0) -> nn.Module:
        """A model trained on a task; merged."""
        machine.seed_everything(seed)
        plan = method.plan(copy.deepcopy(self.dense.model) if model is None else model, self.tasks[task](seed))
        train(plan, method, seed=seed, dtype=DTYPE, quiet=True)
        return merge_all(plan.finish(plan.model.eval()))

    def spectra(self, model: nn.Module) -> list[Matrix]:
        """Of the model as it is in memory."""
        return list(look(self.base, self.in_memory(model), k=K, vectors="left", cache=self.cache))

    def kept(self, seed: int) -> Path:
        """Where the weights of one run are."""
        return self.cache.directory.with_name(f"r8-{seed}.pt")

    def in_memory(self, model: nn.Module) -> Stored:
        linears = block_linears(model)
        return Stored("tuned", self.base.path, self.base.shapes, lambda name: linears[name].weight.detach().float())


def _text(task: int) -> str:
    return "task" if task == 0 else f"task-{task}"


@pytest.fixture(scope="module")
def bench(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("spectra")
    dense = artifact.load(smol, dtype=DTYPE)

    def data_of(path: str) -> Callable[[int], Data]:
        corpus = open_corpus(CorpusSpec(path=path))
        return lambda seed: Data(corpus, dense.processor, seed)

    tasks = tuple(data_of(str(task_file(folder / f"task-{kind}.jsonl", kind))) for kind in range(3))
    texts = {"sample": data_of("sample"), **{_text(kind): data for kind, data in enumerate(tasks)}}
    heldout = {}
    for name, data in texts.items():
        limit, seq_len = HELDOUT["sample" if name == "sample" else "task"]
        heldout[name] = data(0).windows("heldout", seq_len=seq_len, limit=limit)
    return Bench(dense, stored(str(smol)), tasks, heldout, Cache(folder / "cache"))


@dataclass(frozen=True, slots=True)
class Run:
    """What is kept of one training."""

    task: float
    general: float
    intruders: int
    rank: float


@pytest.fixture(scope="module")
def runs(bench: Bench) -> dict[str, list[Run]]:
    """Every way to train, by seed; the weights of rank 8 stay on disk for the sweeps."""
    found: dict[str, list[Run]] = {}
    for name, method in trainings().items():
        for seed in SEEDS:
            model = bench.tuned(method, seed)
            if name == "r8":
                torch.save({n: layer.weight.detach() for n, layer in block_linears(model).items()}, bench.kept(seed))
            matrices = bench.spectra(model)
            count = sum(len(matrix.intruders(EPS)) for matrix in matrices)
            rank = statistics.median(stable_rank(matrix.change_R) for matrix in matrices)
            found.setdefault(name, []).append(Run(bench.loss(model, "task"), bench.loss(model, "sample"), count, rank))
    told = {"r1": "LoRA, rank 1", "r8": "LoRA, rank 8", "r64rs": "LoRA, rank 64, rank-stabilised", "full": "full"}
    before = bench.loss(bench.dense.model, "sample")
    for name, of_seeds in found.items():
        _record(f"intruders-{name}", f"Intruders, {told[name]}", [one.intruders for one in of_seeds])
        _record(f"rank-{name}", f"Stable rank of the change, {told[name]}", [one.rank for one in of_seeds])
        _record(
            f"forgot-{name}", f"General loss gained, {told[name]}", [one.general - before for one in of_seeds], "nats"
        )
    return found


def test_all_were_trained_to_one_loss(runs):
    """What the comparison rests on."""
    by_seed = zip(*runs.values(), strict=True)

    losses = [[one.task for one in of_seed] for of_seed in by_seed]

    _check("matched", "Largest over smallest task loss", [max(one) / min(one) for one in losses], Target("<=", 1.02))


def test_low_rank_brings_intruders_and_full_training_does_not(runs):
    most = [max(one.intruders, eight.intruders) for one, eight in zip(runs["r1"], runs["r8"], strict=True)]

    _check("against-full", "Intruders of LoRA of rank 1 or 8 over those of full training, plus one each",
           [(count + 1) / (full.intruders + 1) for count, full in zip(most, runs["full"], strict=True)],
           Target(">=", 5))  # fmt: skip


def test_a_higher_stabilised_rank_brings_fewer(runs):
    _check("against-rank", "Intruders of LoRA of rank 8 less those of rank 64, rank-stabilised",
           [low.intruders - high.intruders for low, high in zip(runs["r8"], runs["r64rs"], strict=True)],
           Target(">", 0))  # fmt: skip


def test_the_change_of_full_training_has_a_higher_rank(runs):
    _check("rank-against-full", "Stable rank of the change, full training over LoRA of rank 8",
           [full.rank / low.rank for full, low in zip(runs["full"], runs["r8"], strict=True)],
           Target(">", 1))  # fmt: skip


@pytest.fixture(scope="module")
def sweeps(bench: Bench, runs: dict[str, list[Run]]) -> list[dict[tuple[str, float], tuple[float, float]]]:
    """(task, general) losses by control and lambda, for each seed; lambda 1 is the tuned model, under every control."""
    found = []
    assert len(runs["r8"]) == len(SEEDS)
    model = copy.deepcopy(bench.dense.model)  # a LoRA leaves everything but these layers as it was
    linears = block_linears(model)
    for seed in SEEDS:
        tuned: dict[str, Tensor] = torch.load(bench.kept(seed))
        losses: dict[tuple[str, float], tuple[float, float]] = {}
        for control in ("intruders", "others", "random"):
            machine.seed_everything(seed)
            method = Repair(scale=0, k=K, eps=EPS, control=control)
            removed = {n: method._correction(bench.base, n, tuned[n], bench.cache)[0] for n in bench.base.shapes}
            for scale in LAMBDAS if control == "intruders" else (LAMBDAS[0], LAMBDAS[2]):
                with torch.no_grad():
                    for name, layer in linears.items():
                        layer.weight.copy_(tuned[name] + (1 - scale) * removed[name])
                losses[control, scale] = (bench.loss(model, "task"), bench.loss(model, "sample"))
        found.append(losses)
    for scale in LAMBDAS:
        for place, text in enumerate(("task", "general")):
            values = [one["intruders", scale][place] for one in found]
            _record(f"lambda-{scale:g}-{text}", f"Loss, {text}, intruders times {scale:g}", values, "nats")
    record_controls(found)
    return found


def record_controls(found: Sequence[Mapping[tuple[str, float], tuple[float, float]]]) -> None:
    """Both losses with other directions halved."""
    for control in ("others", "random"):
        for place, text in enumerate(("task", "general")):
            values = [one[control, LAMBDAS[2]][place] for one in found]
            _record(f"control-{control}-{text}", f"Loss, {text}, {control} times {LAMBDAS[2]:g}", values, "nats")


def test_weaker_intruders_give_back_what_was_forgotten(bench, sweeps):
    before = bench.loss(bench.dense.model, "sample")
    shares = []
    for losses in sweeps:
        tuned = losses["intruders", 1.0][1]
        shares.append((tuned - min(losses["intruders", s][1] for s in LAMBDAS if s < 1)) / (tuned - before))

    _check("recovered", "Share of the gain in general loss that the best lambda below 1 gives back", shares,
           Target(">=", 0.2), unit="share")  # fmt: skip


@pytest.mark.parametrize("control", ["others", "random"])
def test_they_cost_the_task_less_than_other_directions(sweeps, control):
    values = [losses[control, 0.5][0] - losses["intruders", 0.5][0] for losses in sweeps]

    _check(f"task-{control}", f"Task loss with {control} halved, less that with the intruders halved", values,
           Target(">", 0), unit="nats")  # fmt: skip


def test_one_task_after_the_other_gathers_intruders_and_forgets(bench):
    from scipy.stats import spearmanr  # comes with the peers

    steps, correlations = [], []
    for seed in SEEDS:
        model, counts, losses = copy.deepcopy(bench.dense.model), [0], [bench.loss(bench.dense.model, "sample")]
        for task in range(len(bench.tasks)):
            method = LoRA(rank=4, alpha=8, lr=8e-3, steps=STEPS_OF_A_TASK, **HOW)
            model = bench.tuned(method, seed, model=model, task=task)
            counts.append(sum(len(matrix.intruders(EPS)) for matrix in bench.spectra(model)))
            losses.append(bench.loss(model, "sample"))
        steps.append(min(later - earlier for earlier, later in pairwise(counts)))
        # Without any intruders there is nothing to go with.
        correlations.append(float(spearmanr(counts, losses).statistic) if len(set(counts)) > 1 else 0.0)

    results.record([_row("sequence", "Fewest intruders added by a task", steps, Target(">=", 0))])
    _check("sequence-correlation", "Rank correlation of intruders and general loss over three tasks", correlations,
           Target(">", 0.5))  # fmt: skip
    assert min(steps) >= 0


def _row(name: str, what: str, values: list[Any], target: Target | None = None, unit: str = "") -> Row:
    verb = "adapt-repair" if name.startswith(("lambda", "control", "recovered", "task-")) else "measure-spectra"
    return Row(id=f"{verb}/{name}", kind="claim", what=what, values=tuple(map(float, values)), unit=unit,
               target=target, seeds=SEEDS, settings=SETTINGS)  # fmt: skip


def _record(name: str, what: str, values: list[Any], unit: str = "") -> None:
    results.record([_row(name, what, values, unit=unit)])


def _check(name: str, what: str, values: list[Any], target: Target, unit: str = "") -> None:
    results.hold(_row(name, what, values, target, unit))
