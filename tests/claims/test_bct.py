"""BCT (Dong and Chen, 2023) on a real model and real text: what its abstract claims, at this size.

SmolLM2-135M, manual pages, fp32 products. Nothing here is random: the values of a row are those of three disjoint
thirds of the held-out text.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import Tensor, nn

from bct_formula import formula_bytes
from overhaul import artifact
from overhaul.bct.model import matrices
from overhaul.bct.scheme import PARTS, Scheme
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.quantize.bct import Bct

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CORPUS = "manpages-en"
THIRDS = (0, 1, 2)
WINDOWS, SEQ_LEN = 12, 256
SETTINGS = {"model": "smollm2-135m", "corpus": CORPUS, "heldout": f"{WINDOWS}x{SEQ_LEN}", "dtype": "fp32"}
SHAPES = {16: "1x16", 64: "1x64", 256: "4x64", 1024: "16x64", 4096: "64x64"}
"""Elements of a block, and a block of so many."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What was measured of one model, one number per third of the text, in nats per token.

    Attributes:
        nats: log-perplexity.
        divergence: Kullback-Leibler divergence of the dense model's predictions from this one's. Perplexity may rise or
            fall by luck of the text; this is never negative, and tells apart what perplexity cannot.
    """

    nats: tuple[float, ...]
    divergence: tuple[float, ...]

    @property
    def perplexities(self) -> tuple[float, ...]:
        return tuple(map(math.exp, self.nats))


@dataclass(slots=True)
class Bench:
    """The dense model, the text, and what was measured so far."""

    dense: nn.Module
    heldout_NT: Tensor
    predicted: list[Tensor] = field(default_factory=list)
    known: dict[str, Loss] = field(default_factory=dict)

    def loss(self, **fields: Any) -> Loss:
        """Of the dense model, or of a compressed copy."""
        key = str(sorted(fields.items()))
        if key not in self.known:
            self.known[key] = self._measured(compressed(self.dense, **fields) if fields else self.dense)
        return self.known[key]

    @torch.no_grad()
    def _measured(self, model: nn.Module) -> Loss:
        inner: Any = model
        nats, divergence = [], []
        for number, ids_BT in enumerate(self.heldout_NT.chunk(len(THIRDS))):
            log_BTV = inner(input_ids=ids_BT, use_cache=False).logits[:, :-1].log_softmax(-1)
            if len(self.predicted) <= number:
                self.predicted.append(log_BTV)
            dense_BTV = self.predicted[number]
            nats.append(-float(log_BTV.gather(-1, ids_BT[:, 1:, None]).mean()))
            divergence.append(float((dense_BTV.exp() * (dense_BTV - log_BTV)).sum(-1).mean()))
        return Loss(tuple(nats), tuple(divergence))

    def lost(self, **fields: Any) -> tuple[float, ...]:
        """Log-perplexity above that of the dense model, on each third."""
        return tuple(ours - dense for ours, dense in zip(self.loss(**fields).nats, self.loss().nats, strict=True))


@torch.no_grad()
def compressed(dense: nn.Module, **fields: Any) -> nn.Module:
    return Bct(**fields).apply(copy.deepcopy(dense), None)


@pytest.fixture(scope="module")
def bench(smol: Path) -> Bench:
    dense = artifact.load(smol, dtype=torch.float32)
    data = Data(open_corpus(CorpusSpec(path=CORPUS)), dense.processor)
    made = Bench(dense.model, data.windows("heldout", seq_len=SEQ_LEN, limit=WINDOWS))
    _record(id="perplexity-fp32", what="Held-out perplexity, fp32", values=made.loss().perplexities)
    return made


def stored(bits: int, block: str, **fields: Any) -> dict[str, Any]:
    """Weights and embedding in blocks of that shape, everything computed in fp32."""
    return {"mode": f"w{bits}a32", "block": block, "embedding_block": block, **fields}


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_beat_rows_and_rows_beat_whole_tensors(bench, bits):
    blocks = ("1x64", "row", "tensor")
    for block in blocks:
        _record(
            id=f"perplexity-w{bits}-{block}",
            values=bench.loss(**stored(bits, block)).perplexities,
            what=f"Held-out perplexity, weights of {bits} bits, one shift per {_told(block)}",
        )
    found = [bench.loss(**stored(bits, block)) for block in blocks]
    for kind, told in (("nats", "log-perplexity"), ("divergence", "divergence from fp32")):
        means = [_mean(getattr(loss, kind)) for loss in found]
        least = min(worse - better for better, worse in pairwise(means))
        _check(id=f"order-w{bits}-{kind}", values=(least,), seeds=(0,),
               what=f"{bits} bits: smallest step of {told} in 1x64 < row < tensor", unit="nats",
               target=Target(">=", 0))  # fmt: skip


def test_with_4_bits_the_block_is_what_matters(bench):
    pairs = zip(bench.lost(**stored(4, "row")), bench.lost(**stored(4, "1x64")), strict=True)

    _check(id="gap-w4", what="4 bits: log-perplexity lost with one shift per row, over that per 64 weights",
           values=tuple(row / block for row, block in pairs), target=Target(">=", 1.5))  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
def test_size_and_quality_of_every_block_size(bench, bits):
    parameters = sum(p.numel() for p in bench.dense.parameters())
    for elements, block in SHAPES.items():
        fields = stored(bits, block)
        scheme = Scheme.model_validate(fields)
        in_blocks = list(matrices(bench.dense, scheme))
        floats = parameters - sum(matrix.weight.numel() for matrix in in_blocks)
        size = 4 * floats + sum(matrix.bytes(bits, scheme) for matrix in in_blocks)
        told = f"{bits} bits, one shift per {elements:,} weights"
        _record(
            id=f"curve-w{bits}-{elements:04}-perplexity",
            what=f"{told}: held-out perplexity",
            values=bench.loss(**fields).perplexities,
        )
        _record(
            id=f"curve-w{bits}-{elements:04}-size",
            what=f"{told}: fp32 bytes over bytes",
            values=(4 * parameters / size,),
            seeds=(0,),
        )
    small, large = (bench.loss(**stored(bits, SHAPES[elements])).divergence for elements in (16, 4096))

    _check(id=f"curve-w{bits}-order", unit="nats",
           what=f"{bits} bits: divergence from fp32 with blocks of 4,096 weights, above that with 16",
           values=tuple(b - a for a, b in zip(small, large, strict=True)), target=Target(">=", 0))  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
def test_float_scales_lose_less_than_shifts(bench, bits):
    shift, scale = (bench.loss(**stored(bits, "1x64", scale=kind)).divergence for kind in ("shift", "fp16"))

    _record(
        id=f"perplexity-w{bits}-fp16",
        values=bench.loss(**stored(bits, "1x64", scale="fp16")).perplexities,
        what=f"Held-out perplexity, weights of {bits} bits, one fp16 scale per 64 weights",
    )
    _check(id=f"shift-w{bits}", unit="nats", target=Target(">=", 0), seeds=(0,),
           what=f"{bits} bits: divergence from fp32 with shifts above that with fp16 scales, blocks of 64",
           values=(_mean(shift) - _mean(scale),))  # fmt: skip


def test_everything_in_8_bits_costs_less_than_5_percent_of_perplexity(bench):
    _record(
        id="perplexity-w8a8",
        what="Held-out perplexity, everything in 8 bits",
        values=bench.loss(mode="w8a8").perplexities,
    )

    _check(id="w8a8", what="Everything in 8 bits: perplexity over that of fp32", target=Target("<=", 1.05),
           values=tuple(map(math.exp, bench.lost(mode="w8a8"))))  # fmt: skip


def test_weights_of_4_bits_with_everything_else_in_8(bench):
    for scale in ("shift", "fp16"):
        _record(
            id=f"perplexity-w4a8-{scale}",
            values=bench.loss(mode="w4a8", scale=scale).perplexities,
            what=f"Held-out perplexity, weights of 4 bits ({scale}), everything else in 8",
        )


def test_the_parts_explain_the_whole(bench):
    named: dict[str, dict[str, Any]] = {part: {"parts": (part,)} for part in PARTS} | {"all": {}}
    found = {name: bench.loss(mode="w8a8", **fields) for name, fields in named.items()}
    for name, loss in found.items():
        told = "everything has" if name == "all" else f"only the part {name} has"
        _record(
            id=f"part-{name}-lost",
            what=f"Log-perplexity lost when {told} 8 bits",
            unit="nats",
            values=bench.lost(mode="w8a8", **named[name]),
        )
        _record(
            id=f"part-{name}-divergence",
            what=f"Divergence from fp32 when {told} 8 bits",
            unit="nats",
            values=loss.divergence,
        )
    together = _mean(found.pop("all").divergence)
    explained = sum(_mean(loss.divergence) for loss in found.values()) / together

    told = "Divergence of the parts alone, summed, over that of all together"
    _check(id="explained-at-least", what=told, seeds=(0,), values=(explained,), target=Target(">=", 0.5))
    _check(id="explained-at-most", what=told, seeds=(0,), values=(explained,), target=Target("<=", 1.5))


@pytest.mark.parametrize("how", ["integer", "unit"])
def test_other_ways_to_sum_and_to_round_probabilities(bench, how):
    fields = {"integer": {"accumulate": "integer"}, "unit": {"probabilities": "unit"}}[how]
    told = {"integer": "sums in int32", "unit": "probabilities in units of 1/255"}[how]

    _check(id=f"w8a8-{how}", what=f"Everything in 8 bits, {told}: perplexity over that of fp32",
           target=Target("<=", 1.05), values=tuple(map(math.exp, bench.lost(mode="w8a8", **fields))))  # fmt: skip


@pytest.mark.parametrize(("mode", "block", "ratio"), [("w8a8", "1x64", 3.9), ("w4a8", "row", 7.9)])
def test_the_ratio_on_disk_is_that_of_the_formula(bench, smol, tmp_path, mode, block, ratio):
    made = artifact.load(smol, dtype=torch.float32)
    parameters = sum(p.numel() for p in made.model.parameters())
    formula = formula_bytes(made.model, int(mode[1]), 64 if block == "1x64" else None, made.dtype.itemsize)
    Bct(mode=mode, block=block, embedding_block=block).apply(made.model, None)
    artifact.write_model(made, tmp_path)
    size = artifact.size_on_disk(tmp_path)

    _check(id=f"disk-{mode}-formula", what=f"{mode}, one shift per {_told(block)}: bytes on disk over the formula's",
           values=(size / formula,), seeds=(0,), target=Target("<=", 1.001))  # fmt: skip
    assert size >= formula
    _check(id=f"disk-{mode}-ratio", what=f"{mode}, one shift per {_told(block)}: fp32 bytes over bytes on disk",
           values=(4 * parameters / size,), seeds=(0,), target=Target(">=", ratio))  # fmt: skip


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _told(block: str) -> str:
    return {"1x64": "64 weights", "row": "row", "tensor": "tensor"}[block]


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(_row(**fields))


def _record(**fields: Any) -> None:
    results.record([_row(**fields)])


def _row(*, id: str, **fields: Any) -> Row:
    return Row(**{"id": f"quantize-bct/{id}", "kind": "claim", "seeds": THIRDS, "settings": SETTINGS, **fields})
