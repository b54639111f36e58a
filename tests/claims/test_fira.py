"""What Fira claims (Chen et al., 2024), at the size of a laptop: scaling factors, and the order of the losses.

A Llama of four layers from scratch, rank an eighth of its width, each rule at the best of three rates, chosen on a seed
of its own. Then SmolLM2-135M, fine-tuned with AdamW and with a sixth of its state.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import Tensor, nn

from claims.from_scratch import CORPUS, HIDDEN, MODEL, SEQ_LEN, FromScratch
from overhaul import artifact, evaluate, machine
from overhaul.adapt.full import Full
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.matrices import manifest
from overhaul.optim.subspace import leading
from overhaul.train import train
from overhaul.watch import Watcher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

SEEDS, TUNING_SEED = (0, 1, 2), 100
STEPS, BATCH_SIZE, RANK, GAP, SCALE = 400, 4, HIDDEN // 8, 50, 0.25
PROJECTED: dict[str, Any] = {"rank": RANK, "gap": GAP, "scale": SCALE}
RATES = {
    "adamw": (3e-4, 1e-3, 3e-3),
    "galore": (1e-2, 3e-2, 1e-1),
    "fira": (3e-3, 1e-2, 3e-2),
    "unscaled": (1e-2, 3e-2, 1e-1),
}
RULES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "galore": {"optimizer": "galore", "projection": PROJECTED},
    "fira": {"optimizer": "fira", "projection": PROJECTED},
    "unscaled": {"optimizer": "fira", "projection": {**PROJECTED, "scaling": "none"}},
}
HOW: dict[str, Any] = {
    "steps": STEPS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "schedule": "cosine", "save_every": 0,
}  # fmt: skip
SETTINGS = {"model": MODEL, "corpus": CORPUS, **HOW, **PROJECTED, "rates": RATES}
LOOK_EVERY = 20
"""Steps between two looks at the scaling factors."""


class Factors(Watcher):
    """AdamW's scaling of each matrix, |adam(G)| / |G|, and what it would be on the gradient's leading directions."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.optimizer = optimizer
        self.matrices = [one.parameter for one in manifest(model) if one.category in ("attention", "mlp")]
        self.low: dict[int, dict[str, Tensor]] = {}
        self.pairs: list[tuple[list[float], list[float]]] = []

    def step(self, model: nn.Module, step: int) -> None:
        found = [self._factors(p, step) for p in self.matrices]
        if step % LOOK_EVERY == 0:
            full, low = zip(*found, strict=True)
            self.pairs.append((list(full), list(low)))

    def _factors(self, parameter: nn.Parameter, step: int) -> tuple[float, float]:
        grad_OI = parameter.grad
        assert grad_OI is not None
        own = self.optimizer.state[parameter]
        whole = own["exp_avg"] / (own["exp_avg_sq"].sqrt() + 1e-8)
        state = self.low.setdefault(id(parameter), {})
        right = grad_OI.shape[0] >= grad_OI.shape[1]
        if (step - 1) % GAP == 0:
            state["basis"] = leading(grad_OI, RANK, "svd", right=right)
        low = (grad_OI if right else grad_OI.t()) @ state["basis"].t()
        state.setdefault("exp_avg", torch.zeros_like(low)).lerp_(low, 0.1)
        state.setdefault("exp_avg_sq", torch.zeros_like(low)).mul_(0.999).addcmul_(low, low, value=0.001)
        inside = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        return float(whole.norm() / grad_OI.norm()), float(inside.norm() / low.norm())


@pytest.fixture(scope="module")
def small(tiny: Path) -> FromScratch:
    return FromScratch.of(tiny)


def trained(small: FromScratch, rule: str, lr: float, seed: int) -> float:
    """Held-out loss after training from scratch."""
    settings = Full.model_validate({**HOW, **RULES[rule], "lr": lr})
    model = small.dense(seed)
    machine.seed_everything(seed)
    train(settings.plan(model, small.data(seed)), settings, seed=seed, quiet=True)
    return small.loss(model.eval())


@pytest.fixture(scope="module")
def losses(small: FromScratch) -> dict[str, list[float]]:
    """Held-out losses of each rule at its best rate, by seed."""
    found: dict[str, list[float]] = {}
    for rule in RULES:
        tried = {lr: trained(small, rule, lr, TUNING_SEED) for lr in RATES[rule]}
        best = min(tried, key=lambda lr: tried[lr] if math.isfinite(tried[lr]) else math.inf)
        found[rule] = [trained(small, rule, best, seed) for seed in SEEDS]
        results.record([
            Row(id=f"optimizers/loss-{rule}", kind="claim", unit="nats", seeds=SEEDS, values=tuple(found[rule]),
                what=f"Held-out loss from scratch under {_TOLD[rule]}",
                settings={**SETTINGS, "lr": best, "tried": tried})
        ])  # fmt: skip
    return found


_TOLD = {"adamw": "AdamW", "galore": "GaLore", "fira": "Fira", "unscaled": "Fira without its scaling"}


def test_it_ends_below_galore(losses):
    _check(
        id="optimizers/ahead-of-galore", what="How much lower Fira's loss is than GaLore's", unit="share",
        values=tuple(1 - fira / galore for fira, galore in zip(losses["fira"], losses["galore"], strict=True)),
        target=Target(">=", 0.02),
    )  # fmt: skip


def test_it_ends_above_itself_without_the_scaling(losses):
    _check(
        id="optimizers/scaling-helps", what="How much higher Fira's loss is without its scaling", unit="share",
        values=tuple(none / fira - 1 for fira, none in zip(losses["fira"], losses["unscaled"], strict=True)),
        target=Target(">", 0),
    )  # fmt: skip


def test_it_is_near_adamw(losses):
    _check(
        id="optimizers/near-adamw", what="Fira's loss over AdamW's", unit="",
        values=tuple(fira / adam for fira, adam in zip(losses["fira"], losses["adamw"], strict=True)),
        target=Target("<=", 1.03),
    )  # fmt: skip


def test_scaling_factors_of_a_few_directions_are_ordered_as_those_of_all(small):
    from scipy.stats import spearmanr  # comes with the peers

    values = []
    for seed in SEEDS:
        settings, model = Full.model_validate({**HOW, "steps": 200, "lr": 3e-3}), small.dense(seed)
        machine.seed_everything(seed)
        plan = settings.plan(model, small.data(seed))
        factors = Factors(plan.optimizer, model)
        train(replace(plan, watchers=(*plan.watchers, factors)), settings, seed=seed, quiet=True)
        correlations = [float(spearmanr(full, low).statistic) for full, low in factors.pairs]
        values.append(sum(correlations) / len(correlations))

    _check(
        id="optimizers/scaling-order", what="Rank correlation of the matrices' scaling factors, low rank and full",
        unit="", values=tuple(values), target=Target(">", 0.9),
    )  # fmt: skip


TUNINGS: dict[str, dict[str, Any]] = {"adamw": {}, "fira": {"optimizer": "fira", "projection": {"rank": 64}}}
TUNING_HOW: dict[str, Any] = {"steps": 100, "batch_size": 2, "seq_len": 128, "save_every": 0}
TUNING_RATES = (1e-4, 3e-4)


class Tuning:
    """SmolLM2-135M, all of whose parameters are trained, under AdamW and under Fira."""

    def __init__(self, smol: Path) -> None:
        self.dtype = machine.compute_dtype("auto", torch.device("cpu"))
        self.dense = artifact.load(smol, dtype=machine.weights_dtype(self.dtype))
        self.corpus = open_corpus(CorpusSpec(path=CORPUS))
        self.heldout_NT = Data(self.corpus, self.dense.processor, 0).windows("heldout", seq_len=128, limit=32)
        self.state_share: dict[str, float] = {}

    def loss(self, rule: str, lr: float, seed: int) -> float:
        """Held-out loss after training, in nats; notes the numbers of state of the blocks' matrices, over 2 O I."""
        settings = Full.model_validate({**TUNING_HOW, **TUNINGS[rule], "lr": lr})
        machine.seed_everything(seed)
        data = Data(self.corpus, self.dense.processor, seed)
        plan = settings.plan(copy.deepcopy(self.dense.model), data)
        train(plan, settings, seed=seed, dtype=self.dtype, quiet=True)
        matrices = [one.parameter for one in manifest(plan.model) if one.category in ("attention", "mlp")]
        kept = sum(
            value.numel() for p in matrices for value in plan.optimizer.state[p].values() if isinstance(value, Tensor)
        )
        self.state_share[rule] = kept / sum(2 * p.numel() for p in matrices)
        return math.log(evaluate.perplexity(plan.model.eval(), self.heldout_NT, dtype=self.dtype).estimate.value)


def test_smollm2_is_fine_tuned_with_a_sixth_of_the_state(smol: Path):
    """Each rule at the best of two rates, chosen on a seed of its own. The embedding has AdamW's state in both."""
    tuning, chosen, ends = Tuning(smol), {}, {}
    for rule in TUNINGS:
        tried = {lr: tuning.loss(rule, lr, TUNING_SEED) for lr in TUNING_RATES}
        chosen[rule] = min(tried, key=lambda lr: tried[lr])
        ends[rule] = [tuning.loss(rule, chosen[rule], seed) for seed in SEEDS]
    settings = {"model": "smollm2-135m", "corpus": CORPUS, "rank": 64, **TUNING_HOW, "rates": TUNING_RATES}
    settings |= {"lr": chosen}
    results.record(
        Row(id=f"optimizers/fine-tuned-{rule}", kind="claim", unit="nats", seeds=SEEDS, settings=settings,
            what=f"SmolLM2-135M after 100 steps: held-out loss under {_TOLD[rule]}", values=tuple(losses))
        for rule, losses in ends.items()
    )  # fmt: skip

    _check(
        id="optimizers/fine-tuned-state", unit="share", values=(tuning.state_share["fira"],), target=Target("<", 1 / 6),
        what="Numbers in Fira's state for the matrices of SmolLM2-135M's blocks, rank 64, over AdamW's", seeds=(0,),
        settings=settings,
    )  # fmt: skip
    _check(
        id="optimizers/fine-tuned", what="SmolLM2-135M after 100 steps: Fira's held-out loss over AdamW's", unit="",
        values=tuple(fira / adam for fira, adam in zip(ends["fira"], ends["adamw"], strict=True)),
        target=Target("<=", 1.02), settings=settings,
    )  # fmt: skip


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(Row(**{"kind": "claim", "seeds": SEEDS, "settings": SETTINGS, **fields}))
