"""PERP (Zimmer et al., 2023) on a real model and real text: what its paper claims, at this size.

SmolLM2-135M, manual pages, 50% magnitude unless said otherwise. The learning rate was chosen once, on another corpus
(boolq-passages), and is the method's default; reconstruction, whose loss is another, has its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
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
from overhaul.adapt.perp import Perp
from overhaul.artifact import Artifact
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.journal import Notes, recording
from overhaul.layers.masked import MaskedLinear
from overhaul.method import Transform
from overhaul.prune.magnitude import Magnitude
from overhaul.prune.sparsegpt import SparseGPT
from overhaul.prune.wanda import Wanda
from overhaul.train import History, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

CORPUS = "manpages-en"
SEEDS = (0, 1, 2)
STEPS, BATCH_SIZE, SEQ_LEN, RANK = 100, 2, 256, 8
HELDOUT_WINDOWS = 48
CALIBRATION: dict[str, Any] = {"samples": 32, "seq_len": 256}
PRECISION = torch.bfloat16
SETTINGS = {
    "model": "smollm2-135m", "corpus": CORPUS, "steps": STEPS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN,
    "rank": RANK, "lr": Perp.model_fields["lr"].default, "heldout": f"{HELDOUT_WINDOWS}x{SEQ_LEN}",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Retrained:
    """A model after PERP, and how that went."""

    model: nn.Module
    histories: Sequence[History]
    notes: Notes


@dataclass(frozen=True, slots=True)
class Bench:
    """The dense model and the text."""

    dense: Artifact
    data: Callable[[int], Data]
    heldout_NT: Tensor

    def perplexity(self, model: nn.Module) -> float:
        return evaluate.perplexity(model, self.heldout_NT, dtype=PRECISION, batch_size=4).estimate.value

    def pruned(self, method: Transform, seed: int) -> nn.Module:
        model = copy.deepcopy(self.dense.model)
        calib = self.data(seed).calibration(**CALIBRATION) if method.needs_data else None
        with recording(), torch.no_grad():
            return method.apply(model, calib)

    def retrained(self, pruned: nn.Module, method: Perp, seed: int, dtype: torch.dtype = PRECISION) -> Retrained:
        """A trained and merged copy, in the type that would be written."""
        model, stored = copy.deepcopy(pruned), pruned.get_parameter("model.norm.weight").dtype
        machine.seed_everything(seed)
        histories = []
        with recording() as notes:
            for plan in method.stages(model, self.data(seed)):
                histories.append(train(plan, method, seed=seed, dtype=dtype, quiet=True))
                plan.model.requires_grad_(False)
                with torch.no_grad():
                    plan.finish(plan.model)
        return Retrained(model.to(stored), histories, notes)


@pytest.fixture(scope="module")
def bench(smol: Path) -> Bench:
    dense = artifact.load(smol)
    corpus = open_corpus(CorpusSpec(path=CORPUS))

    def data(seed: int) -> Data:
        return Data(corpus, dense.processor, seed, dense_tensors=_tensors_of(dense.model))

    return Bench(dense, data, data(0).windows("heldout", seq_len=SEQ_LEN, limit=HELDOUT_WINDOWS))


@pytest.fixture(scope="module")
def magnitude(bench: Bench) -> nn.Module:
    return bench.pruned(Magnitude(sparsity=0.5), seed=0)


@pytest.fixture(scope="module")
def won_back(bench: Bench, magnitude: nn.Module) -> dict[str, list[float]]:
    """Held-out perplexities: of the dense and the pruned model, of each way to retrain, and of Wanda, by seed."""
    found = {
        "dense": [bench.perplexity(bench.dense.model)] * len(SEEDS),
        "pruned": [bench.perplexity(magnitude)] * len(SEEDS),
        "norms": [], "mask_lora": [], "wanda": [],
    }  # fmt: skip
    for seed in SEEDS:
        for name, groups in (("norms", ("norms",)), ("mask_lora", ("norms", "mask_lora"))):
            retrained = bench.retrained(magnitude, _perp(groups), seed)
            found[name].append(bench.perplexity(retrained.model))
        found["wanda"].append(bench.perplexity(bench.pruned(Wanda(sparsity=0.5, **CALIBRATION), seed)))
    results.record(
        Row(id=f"adapt-perp/perplexity-{name}", kind="claim", what=f"Held-out perplexity, {_TOLD[name]}",
            values=tuple(values), seeds=SEEDS, settings=SETTINGS)
        for name, values in found.items()
    )  # fmt: skip
    return found


_TOLD = {
    "dense": "dense",
    "pruned": "50% magnitude",
    "norms": "50% magnitude, norms retrained",
    "mask_lora": "50% magnitude, norms and mask_lora retrained",
    "wanda": "50% Wanda, nothing retrained",
}


@pytest.mark.parametrize(("name", "share"), [("norms", 0.60), ("mask_lora", 0.85)])
def test_retraining_a_small_part_wins_most_of_the_quality_back(won_back, name, share):
    logs = {key: [math.log(value) for value in values] for key, values in won_back.items()}
    triples = zip(logs["dense"], logs["pruned"], logs[name], strict=True)

    _check(
        id=f"adapt-perp/won-back-{name}", unit="share", target=Target(">=", share),
        what=f"Share of the log-perplexity gap won back by {'norms' if name == 'norms' else 'norms and mask_lora'}",
        values=tuple((pruned - now) / (pruned - dense) for dense, pruned, now in triples),
    )  # fmt: skip


def test_more_trained_parts_win_more_back(won_back):
    order = ("dense", "mask_lora", "norms", "pruned")
    steps = [
        min(math.log(won_back[worse][run] / won_back[better][run]) for better, worse in pairwise(order))
        for run in range(len(SEEDS))
    ]

    _check(
        id="adapt-perp/order", unit="nats",
        what="Smallest step of log-perplexity in dense < mask_lora < norms < pruned",
        target=Target(">", 0), values=tuple(steps),
    )  # fmt: skip


def test_magnitude_becomes_a_contender(won_back):
    pairs = zip(won_back["mask_lora"], won_back["wanda"], strict=True)

    _check(
        id="adapt-perp/contender", what="Perplexity of magnitude with mask_lora over that of Wanda without retraining",
        target=Target("<=", 1), values=tuple(ours / wanda for ours, wanda in pairs),
    )  # fmt: skip


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_reconstruction_helps_each_criterion(bench, criterion):
    method: Transform = {
        "magnitude": Magnitude(sparsity=0.6),
        "wanda": Wanda(sparsity=0.6, **CALIBRATION),
        "sparsegpt": SparseGPT(sparsity=0.6, **CALIBRATION),
    }[criterion]
    reconstruct = _perp(("norms", "mask_lora"), reconstruct=True, **RECONSTRUCTION)
    errors, perplexities = [], []
    for seed in SEEDS:
        pruned = bench.pruned(method, seed)
        before = bench.perplexity(pruned)
        done = bench.retrained(pruned, reconstruct, seed)
        errors.append(max(part.after / part.before for part in done.notes.parts))
        perplexities.append(bench.perplexity(done.model) / before)

    settings = SETTINGS | RECONSTRUCTION | {"sparsity": 0.6, **CALIBRATION}
    _check(
        id=f"adapt-perp/reconstruct-{criterion}-error", target=Target("<", 1), values=tuple(errors), settings=settings,
        what=f"60% {criterion}, reconstructed: largest squared error of a block, over that before",
    )  # fmt: skip
    _check(
        id=f"adapt-perp/reconstruct-{criterion}-perplexity", target=Target("<", 1), values=tuple(perplexities),
        what=f"60% {criterion}, reconstructed: perplexity over that before", settings=settings,
    )  # fmt: skip


RECONSTRUCTION: dict[str, Any] = {"steps": 25, "batch_size": 4, "lr": 1e-3, "samples": CALIBRATION["samples"]}


@pytest.mark.parametrize("adapter", ["mask_lora", "lora_prune", "scale_lora"])
def test_merging_keeps_every_zero(bench, magnitude, adapter):
    trained = bench.retrained(magnitude, _perp(("norms", adapter), steps=3), seed=0).model

    filled = 0
    for before, after in zip(_masked(magnitude), _masked(trained), strict=True):
        assert int((~after.mask).sum()) == before.mask.numel() // 2
        filled += int(after.weight[~before.mask].count_nonzero())
    _check(
        id=f"adapt-perp/zeros-{adapter}", what=f"Pruned weights that are not zero after {adapter} is merged",
        unit="count", target=Target("==", 0), values=(float(filled),), seeds=(0,), settings=SETTINGS | {"steps": 3},
    )  # fmt: skip


@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora"])
def test_the_merge_is_exact(bench, magnitude, adapter):
    model, method = copy.deepcopy(magnitude).float(), _perp(("norms", adapter), steps=3)
    ids_BT = bench.heldout_NT[:1]
    machine.seed_everything(0)
    plan = method.plan(model, bench.data(0))
    train(plan, method, dtype=torch.float32, quiet=True)

    with torch.no_grad():
        adapted = model(ids_BT).logits
        merged = plan.finish(model)(ids_BT).logits

    _check(
        id=f"adapt-perp/merge-{adapter}", what=f"Largest difference of a logit when {adapter} is merged, fp32",
        target=Target("<", 1e-4), values=(float((adapted - merged).abs().max()),), seeds=(0,),
        settings=SETTINGS | {"steps": 3},
    )  # fmt: skip


def test_norms_alone_need_almost_no_optimizer_state(bench, magnitude):
    histories = {
        name: bench.retrained(magnitude, _perp((name,), steps=1, lr=1e-5), seed=0).histories[0]
        for name in ("norms", "full")
    }

    for name, target in (("norms", Target("<", 1e6)), ("full", None)):
        _check(
            id=f"adapt-perp/optimizer-bytes-{name}", what=f"Optimizer state when {name} is trained", unit="bytes",
            target=target, values=(float(histories[name].optimizer_bytes),), seeds=(0,),
            settings=SETTINGS | {"steps": 1, "lr": 1e-5},
        )  # fmt: skip


def _perp(groups: Sequence[str], **fields: Any) -> Perp:
    common = {"steps": STEPS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "rank": RANK, "save_every": 0}
    return Perp.model_validate({**common, "train": tuple(groups), **fields})


def _tensors_of(dense: nn.Module) -> Callable[[str], dict[str, Tensor]]:
    """The dense weights below a prefix, as reading them from the ancestor's files gives them."""
    state = {name: tensor.detach().clone() for name, tensor in dense.named_parameters()}
    return lambda prefix: {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _masked(model: nn.Module) -> list[MaskedLinear]:
    return [module for module in model.modules() if isinstance(module, MaskedLinear)]


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(Row(**{"kind": "claim", "seeds": SEEDS, "settings": SETTINGS, **fields}))
