"""SLTrain (Han et al., 2024) at the size of a laptop: what the paper claims of training from scratch, and a conversion.

From scratch: a Llama of four layers on passages of Wikipedia, the same tokens in the same order for all: dense,
SLTrain, and low-rank with at least as many parameters as SLTrain. Each has the best of three learning rates, chosen on
the first seed. The dense ones are then converted with three kinds of support and trained on. SmolLM2-135M is converted
too.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import nn

from claims.from_scratch import CORPUS, FFN, HELDOUT_WINDOWS, HIDDEN, MODEL, SEQ_LEN, FromScratch
from overhaul import artifact, evaluate, factored, machine
from overhaul.adapt.full import Full
from overhaul.adapt.sltrain import SLTrain
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

SEEDS = (0, 1, 2)
RANK, DENSITY, ALPHA = 16, 0.05, 16.0
STEPS, BATCH_SIZE = 300, 4
RATES = {"dense": (3e-4, 1e-3, 3e-3), "sltrain": (1e-3, 3e-3, 1e-2), "low-rank": (3e-3, 1e-2, 3e-2)}
ON_STEPS, ON_RATE = 100, 1e-3
"""Of the conversion: how long it is trained on, at what rate, which was not tuned."""
HOW: dict[str, Any] = {
    "steps": STEPS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "schedule": "cosine", "clip": 1.0, "save_every": 0,
}  # fmt: skip
FORM: dict[str, Any] = {"density": DENSITY, "alpha": ALPHA}
SETTINGS = {
    "model": MODEL, "corpus": CORPUS, "rank": RANK, **FORM, **HOW,
    "rates": RATES, "heldout": f"{HELDOUT_WINDOWS}x{SEQ_LEN}",
}  # fmt: skip
SMOL: dict[str, Any] = {
    "model": "smollm2-135m", "corpus": CORPUS, "rank": 128, "density": 0.03, "lr": 1e-3, "steps": 50, "batch_size": 2,
    "seq_len": 256,
}  # fmt: skip
SUPPORTS = ("random", "largest", "none")


class Bench(FromScratch):
    """Dense, SLTrain's and low-rank models, trained alike."""

    def fresh(self, kind: str, seed: int) -> nn.Module:
        """An untrained model."""
        if kind == "dense":
            return self.dense(seed)
        torch.manual_seed(seed)
        form = FORM if kind == "sltrain" else {"density": 0.0, "alpha": ALPHA}
        return factored.from_config(self.config, rank=RANK if kind == "sltrain" else low_rank(), seed=seed, **form)

    def trained(self, model: nn.Module, seed: int, lr: float, steps: int = STEPS) -> nn.Module:
        """The model after the same tokens as every other of that seed."""
        settings = Full(**{**HOW, "lr": lr, "steps": steps, "keep_zeros": False})
        machine.seed_everything(seed)
        plan = settings.plan(model, self.data(seed))
        train(plan, settings, seed=seed, quiet=True)
        return model.eval()


def low_rank() -> int:
    """The smallest rank without a sparse part that has at least as many parameters."""
    weights = 4 * HIDDEN**2 + 3 * HIDDEN * FFN
    return RANK + math.ceil(DENSITY * weights / (4 * 2 * HIDDEN + 3 * (HIDDEN + FFN)))


@pytest.fixture(scope="module")
def bench(tiny: Path) -> Bench:
    return Bench.of(tiny)


@pytest.fixture(scope="module")
def models(bench: Bench) -> dict[str, list[nn.Module]]:
    """The trained models of each kind by seed, each at its best rate."""
    found: dict[str, list[nn.Module]] = {}
    for kind, rates in RATES.items():
        tried = {lr: bench.trained(bench.fresh(kind, SEEDS[0]), SEEDS[0], lr) for lr in rates}
        losses = {lr: bench.loss(model) for lr, model in tried.items()}
        best = min(rates, key=lambda lr: losses[lr])
        found[kind] = [tried[best], *(bench.trained(bench.fresh(kind, seed), seed, best) for seed in SEEDS[1:])]
        _record(
            id=f"adapt-sltrain/loss-{kind}", what=f"Held-out loss from scratch, {_TOLD[kind]}",
            values=tuple(bench.loss(model) for model in found[kind]),
            settings={**SETTINGS, "lr": best, "tried": losses, "parameters": _num_parameters(found[kind][0])},
        )  # fmt: skip
    return found


_TOLD = {"dense": "dense", "sltrain": "SLTrain", "low-rank": "low rank with as many parameters"}


@pytest.fixture(scope="module")
def losses(bench: Bench, models: dict[str, list[nn.Module]]) -> dict[str, list[float]]:
    return {kind: [bench.loss(model) for model in made] for kind, made in models.items()}


def test_the_low_rank_model_has_no_fewer_parameters(bench):
    sltrain, lower, dense = (_num_parameters(bench.fresh(kind, 0)) for kind in ("sltrain", "low-rank", "dense"))

    assert sltrain <= lower < 1.04 * sltrain < dense  # one rank more is 3%


def test_it_ends_below_the_low_rank_model_of_its_size(losses):
    _check(
        id="adapt-sltrain/ahead-of-low-rank", target=Target(">", 0),
        what="Held-out loss of the low-rank model less that of SLTrain with no more parameters",
        values=tuple(low - ours for low, ours in zip(losses["low-rank"], losses["sltrain"], strict=True)),
    )  # fmt: skip


def test_its_gap_to_dense_is_at_most_half_of_the_low_rank_models(losses):
    rows = zip(losses["dense"], losses["sltrain"], losses["low-rank"], strict=True)

    _check(
        id="adapt-sltrain/gap-to-dense", unit="share", target=Target("<=", 0.5),
        what="Gap of SLTrain to dense training over the gap of the low-rank model of its size",
        values=tuple((ours - dense) / (low - dense) for dense, ours, low in rows),
    )  # fmt: skip


def test_trained_weights_have_a_higher_rank_than_their_product(models):
    def smallest(model: nn.Module) -> float:
        layers = factored.factored_layers(model).values()
        ranks = [(int(torch.linalg.matrix_rank(x.dense())), min(x.out_features, x.in_features)) for x in layers]
        return min(rank / full for rank, full in ranks)

    with torch.no_grad():
        values = tuple(smallest(model) for model in models["sltrain"])
    _check(
        id="adapt-sltrain/rank", unit="share", values=values, target=Target(">", RANK / HIDDEN),
        what=f"Rank of a trained weight over its full rank, the smallest of the layers ({RANK} of {HIDDEN} in B A)",
    )  # fmt: skip


def test_the_tail_of_the_spectrum_is_that_of_the_sparse_part(models):
    """The product has no singular value beyond its rank: what is there must be the sparse part's."""

    def tail(model: nn.Module) -> float:
        shares = []
        for layer in factored.factored_layers(model).values():
            weight, product = torch.linalg.svdvals(layer.dense()), layer.scale * layer.factor_B @ layer.factor_A
            assert torch.linalg.svdvals(product)[RANK] < 1e-5 * weight[0]
            shares.append(float(weight[RANK:].square().sum() / weight.square().sum()))
        return sum(shares) / len(shares)

    with torch.no_grad():
        values = tuple(tail(model) for model in models["sltrain"])
    _check(
        id="adapt-sltrain/tail", unit="share", values=values, target=Target(">", 0.01),
        what="Share of a trained weight's energy beyond the rank of its product, which the sparse part holds",
    )  # fmt: skip


@pytest.fixture(scope="module")
def supports(bench: Bench, models: dict[str, list[nn.Module]]) -> dict[str, list[float]]:
    """Losses of the dense models converted with each kind of support, after training on."""
    found: dict[str, list[float]] = {}
    for kind in SUPPORTS:
        before, after = [], []
        for seed, dense in zip(SEEDS, models["dense"], strict=True):
            model = copy.deepcopy(dense)
            factored.convert(model, rank=RANK, support=kind, seed=seed, **FORM)
            before.append(bench.loss(model))
            after.append(bench.loss(bench.trained(model, seed, ON_RATE, ON_STEPS)))
        settings = {**SETTINGS, "steps": ON_STEPS, "lr": ON_RATE}
        for when, values in (("converted", before), ("trained-on", after)):
            _record(
                id=f"adapt-sltrain/{when}-{kind}", values=tuple(values), settings=settings,
                what=f"Held-out loss of the dense model {when.replace('-', ' ')}, support {kind}",
            )  # fmt: skip
        found[kind] = after
    return found


def test_a_random_support_is_as_good_as_the_largest_residuals(supports):
    pairs = zip(supports["random"], supports["largest"], strict=True)

    _check(
        id="adapt-sltrain/random-over-largest", target=Target("<=", 1.02), unit="",
        what="Held-out loss with a random support over that with the largest residuals, converted and trained on",
        values=tuple(random / largest for random, largest in pairs),
    )  # fmt: skip


# SmolLM2.


@pytest.fixture(scope="module")
def conversions(smol: Path) -> Sequence[tuple[float, float, float]]:
    """Perplexity of the original, of the converted model, and after training, by seed."""
    dtype = machine.compute_dtype("auto", torch.device("cpu"))
    dense = artifact.load(smol, dtype=machine.weights_dtype(dtype))
    corpus = open_corpus(CorpusSpec(path=CORPUS))
    data = functools.partial(Data, corpus, dense.processor)
    heldout_NT = data(0).windows("heldout", seq_len=SMOL["seq_len"], limit=32)

    def perplexity(model: nn.Module) -> float:
        return evaluate.perplexity(model, heldout_NT, dtype=dtype, batch_size=4).estimate.value

    chosen = {name: value for name, value in SMOL.items() if name not in ("model", "corpus")}
    settings, original, found = SLTrain(**chosen, save_every=0), perplexity(dense.model), []
    for seed in SEEDS:
        machine.seed_everything(seed)
        plan = settings.plan(copy.deepcopy(dense.model), data(seed))
        converted = perplexity(plan.model.eval())
        train(plan, settings, seed=seed, dtype=dtype, quiet=True)
        found.append((original, converted, perplexity(plan.finish(plan.model.eval()))))
    for name, values in zip(("original", "converted", "trained"), zip(*found, strict=True), strict=True):
        _record(
            id=f"adapt-sltrain/smollm2-{name}", unit="", values=tuple(values), settings=SMOL,
            what=f"Held-out perplexity of SmolLM2-135M, {name}",
        )  # fmt: skip
    return found


def test_training_wins_back_what_converting_smollm2_costs(conversions):
    def won_back(original: float, converted: float, trained: float) -> float:
        return (math.log(converted) - math.log(trained)) / (math.log(converted) - math.log(original))

    _check(
        id="adapt-sltrain/smollm2-won-back", unit="share", target=Target(">", 0), settings=SMOL,
        what="Share of the log-perplexity lost by converting SmolLM2-135M that 50 small steps win back",
        values=tuple(won_back(*one) for one in conversions),
    )  # fmt: skip


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _row(**fields: Any) -> Row:
    return Row(**{"kind": "claim", "unit": "nats", "seeds": SEEDS, "settings": SETTINGS, **fields})


def _record(**fields: Any) -> None:
    results.record([_row(**fields)])


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(_row(**fields))
