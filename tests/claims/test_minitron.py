"""Minitron (Muralidharan et al., 2024) on a real model and real text: what its paper claims, at this size.

SmolLM2-135M, manual pages. Scores come from one pass; nothing was tuned on the held-out text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import Tensor, nn

from overhaul import artifact, candidates, evaluate, importance, machine
from overhaul.artifact import Artifact
from overhaul.candidates import ShortDistillation
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.cut import Kept, cut
from overhaul.data import Data
from overhaul.depth import Depth
from overhaul.importance import Scores
from overhaul.interop import decoder
from overhaul.interop.decoder import Decoder
from overhaul.shapes import Grid, Shape, shapes_for
from overhaul.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

CORPUS = "manpages-en"
SEEDS = (0, 1, 2, 3, 4)
SEQ_LEN, HELDOUT_WINDOWS, SAMPLES = 256, 16, 32
SHARE, CANDIDATES, BATCH_SIZE, TRAINING_SEQ_LEN, LR = 0.7, 6, 2, 128, 5e-4
SHORT_STEPS, LONG_STEPS = 16, 44
SPEED_ROUNDS = 5
SETTINGS = {
    "model": "smollm2-135m", "corpus": CORPUS, "samples": SAMPLES, "seq_len": SEQ_LEN,
    "heldout": f"{HELDOUT_WINDOWS}x{SEQ_LEN}",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bench:
    """The original, its scores, and the text."""

    original: Artifact
    found: Decoder
    scores: Scores
    data: Data
    heldout_NT: Tensor
    dtype: torch.dtype

    def loss(self, model: nn.Module) -> float:
        return candidates.loss(model, self.heldout_NT, self.dtype)

    def cut(self, target: Shape, scores: Scores, layers_L: Tensor | None = None) -> nn.Module:
        kept_L = torch.arange(self.found.shape.layers) if layers_L is None else layers_L
        return cut(self.original.model, importance.choose(scores, self.found.shape, target, kept_L))


@pytest.fixture(scope="module")
def bench(smol: Path) -> Bench:
    dtype = machine.compute_dtype("auto", torch.device("cpu"))
    original = artifact.load(smol, dtype=machine.weights_dtype(dtype))
    data = Data(open_corpus(CorpusSpec(path=CORPUS)), original.processor)
    calib = data.calibration(samples=SAMPLES, seq_len=SEQ_LEN, batch_size=4)
    scores = importance.score(original.model, calib, dtype=dtype)
    heldout_NT = data.windows("heldout", seq_len=SEQ_LEN, limit=HELDOUT_WINDOWS)
    return Bench(original, decoder.find(original.model), scores, data, heldout_NT, dtype)


def drawn(scores: Scores, seed: int) -> Scores:
    """Scores that know nothing."""
    generator = torch.Generator().manual_seed(seed)
    fields = {name: getattr(scores, name) for name in ("ffn_LF", "head_LH", "group_LG", "hidden_D", "block_L")}
    return replace(scores, **{name: torch.rand(t.shape, generator=generator) for name, t in fields.items()})


def turned(scores: Scores) -> Scores:
    """Scores by which the most important goes first."""
    return replace(scores, ffn_LF=-scores.ffn_LF, hidden_D=-scores.hidden_D, block_L=-scores.block_L)


@pytest.mark.parametrize(("axis", "size"), [("ffn", 1024), ("hidden", 512)])
def test_scores_beat_chance_and_chance_beats_the_reverse(bench: Bench, axis: str, size: int):
    target = replace(bench.found.shape, **{axis: size})
    own = bench.loss(bench.cut(target, bench.scores))
    chance = [bench.loss(bench.cut(target, drawn(bench.scores, seed))) for seed in SEEDS]
    reverse = bench.loss(bench.cut(target, turned(bench.scores)))

    what = f"{axis} {getattr(bench.found.shape, axis)} to {size}, held-out loss"
    found = {"by the scores": [own], "at random": chance, "the other way round": [reverse]}
    results.record(
        Row(id=f"shrink-minitron/{axis}-{told.replace(' ', '-')}", kind="claim", what=f"{what}, {told}", unit="nats",
            values=tuple(values), seeds=SEEDS[: len(values)], settings=SETTINGS)
        for told, values in found.items()
    )  # fmt: skip
    _check(
        id=f"shrink-minitron/{axis}-over-chance", what=f"{what}: at random less by the scores", unit="nats",
        target=Target(">", 0), values=tuple(loss - own for loss in chance),
    )  # fmt: skip
    _check(
        id=f"shrink-minitron/{axis}-over-reverse", what=f"{what}: the other way round less at random", unit="nats",
        target=Target(">", 0), values=tuple(reverse - loss for loss in chance),
    )  # fmt: skip


def test_block_importance_beats_chance(bench: Bench):
    target = replace(bench.found.shape, layers=bench.found.shape.layers - 6)

    def loss_by(scores: Scores) -> float:
        depth = Depth(bench.original.model, scores, by="block", windows=lambda: bench.heldout_NT)
        return bench.loss(bench.cut(target, bench.scores, depth.kept(target.layers)))

    own, chance = loss_by(bench.scores), [loss_by(drawn(bench.scores, seed)) for seed in SEEDS]

    _check(
        id="shrink-minitron/layers-over-chance", unit="nats", target=Target(">", 0),
        what="6 of 30 layers cut, held-out loss: at random less by block importance",
        values=tuple(loss - own for loss in chance),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "cut_to"), [("ffn", {"ffn": 832}), ("layers", {"layers": 20})])
def test_a_third_fewer_block_parameters_are_a_quarter_faster(bench: Bench, name: str, cut_to: dict[str, int]):
    source, of = bench.found.shape, bench.found.architecture
    target = replace(source, **cut_to)
    smaller = bench.cut(target, bench.scores, torch.arange(target.layers))
    removed = 1 - of.block_parameters(target) / of.block_parameters(source)
    assert 0.32 < removed < 0.36

    speeds: dict[str, list[float]] = {"original": [], "cut": []}
    for round_ in range(-1, SPEED_ROUNDS):
        for which, model in (("original", bench.original.model), ("cut", smaller)):
            scored = evaluate.perplexity(model, bench.heldout_NT[:4], dtype=bench.dtype)
            if round_ >= 0:  # the first round warms up
                speeds[which].append(scored.tokens_per_second)

    _check(
        id=f"shrink-minitron/speed-{name}", kind="bench", unit="tokens/s", target=Target(">=", 1.25),
        what=f"{cut_to[name]} of {getattr(source, name)} {name}, {removed:.0%} fewer block parameters: scoring text",
        values=tuple(speeds["cut"]), peer=tuple(speeds["original"]), peer_name="the original", seeds=(),
    )  # fmt: skip


def test_the_ranking_after_a_short_training_tells_more_than_that_after_the_cut(bench: Bench):
    losses = _three_rankings(bench)

    short, long = losses["short"], losses["long"]
    results.record(
        Row(id=f"shrink-minitron/ranking-{name}", kind="claim", unit="nats", values=tuple(values),
            what=f"{CANDIDATES} shapes of {SHARE:.0%} of the parameters: held-out loss {told}", settings=_ranking())
        for name, told, values in (
            ("cut", "right after the cut", losses["cut"]),
            ("short", f"after {SHORT_STEPS} steps", short),
            ("long", f"after {SHORT_STEPS + LONG_STEPS} steps", long),
        )
    )  # fmt: skip
    at_once, soon = kendall_tau(losses["cut"], long), kendall_tau(short, long)
    results.record([
        Row(id="shrink-minitron/tau-cut", kind="claim", values=(at_once,), settings=_ranking(),
            what="Kendall tau with the ranking after the longer distillation: of that right after the cut")
    ])  # fmt: skip
    results.record([
        Row(id="shrink-minitron/tau-short", kind="claim", values=(soon,), settings=_ranking(),
            what="Kendall tau with the ranking after the longer distillation: of that after the short one")
    ])  # fmt: skip
    _check(
        id="shrink-minitron/tau", target=Target(">", 0), values=(soon - at_once,), seeds=(0,), settings=_ranking(),
        what="Kendall tau with the ranking after the longer distillation: after the short one less after the cut",
    )  # fmt: skip


def _three_rankings(bench: Bench) -> dict[str, list[float]]:
    """Held-out losses of the candidates right after the cut, after a short distillation, and after going on with it."""
    of = bench.found.architecture
    grid = Grid(source=bench.found.shape, architecture=of, accepts=lambda shape: decoder.can_say(bench.found, shape))
    shapes = shapes_for(grid, round(SHARE * of.parameters(bench.found.shape)), 0.05, CANDIDATES)
    depth = Depth(bench.original.model, bench.scores, by="block", windows=lambda: bench.heldout_NT)
    work = Workspace(data=bench.data, dtype=bench.dtype, path=bench.original.path, weights_sha256="")
    losses: dict[str, list[float]] = {"cut": [], "short": [], "long": []}
    for shape in shapes:
        began = time.perf_counter()
        student = bench.cut(shape, bench.scores, depth.kept(shape.layers))
        losses["cut"].append(bench.loss(student))
        for name, steps in (("short", SHORT_STEPS), ("long", LONG_STEPS)):
            settings = {"teacher": bench.original.model, "steps": steps, "batch_size": BATCH_SIZE, "lr": LR}
            distil = ShortDistillation.model_validate(settings | {"seq_len": TRAINING_SEQ_LEN})
            machine.seed_everything(0)
            work.train(distil.plan(student, bench.data), distil)
            losses[name].append(bench.loss(student))
        told = ", ".join(f"{name} {values[-1]:.3f}" for name, values in losses.items())
        print(f"{shape}: {told}, {time.perf_counter() - began:.0f} s")
    return losses


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """(pairs in the same order - pairs in opposite order) / pairs; losses are never equal."""
    signs = [
        math.copysign(1, (first[a] - first[b]) * (second[a] - second[b])) for a, b in combinations(range(len(first)), 2)
    ]
    return sum(signs) / len(signs)


def test_the_file_is_as_small_as_the_formula_says(bench: Bench, tmp_path: Path):
    target = Shape(layers=27, hidden=448, ffn=1152, heads=6, kv_groups=3)
    smaller: Any = bench.cut(target, bench.scores, torch.arange(target.layers)).to(torch.bfloat16)
    smaller.save_pretrained(tmp_path)

    by_hand = 49152 * 448 + 27 * (2 * 448 * 6 * 64 + 2 * 448 * 3 * 64 + 3 * 448 * 1152 + 2 * 448) + 448
    counted = sum(parameter.numel() for parameter in smaller.parameters())
    size = artifact.size_on_disk(tmp_path)
    _check(
        id="shrink-minitron/formula",
        what="Parameters of a cut model less V d + L (2 d H dh + 2 d G dh + 3 d f + 2 d) + d",
        unit="count", target=Target("==", 0), values=(float(counted - by_hand),), seeds=(0,),
    )  # fmt: skip
    _check(
        id="shrink-minitron/bytes", what="Bytes on disk over two for each parameter of the formula",
        target=Target("<", 1.001), values=(size / (2 * by_hand),), seeds=(0,),
    )  # fmt: skip


def test_what_is_cut_is_what_is_zeroed(bench: Bench):
    """The sheet's identity on the real model: nothing but the removed neurons is missing."""
    target = replace(bench.found.shape, ffn=1024)
    kept = importance.choose(bench.scores, bench.found.shape, target, torch.arange(30))
    smaller = cut(bench.original.model, kept)
    with _zeroed(bench.original.model, kept) as zeroed, torch.no_grad():
        gap = (zeroed(bench.heldout_NT[:1]).logits - smaller(bench.heldout_NT[:1]).logits).abs().max()

    _check(
        id="shrink-minitron/identity", target=Target("<", 1e-3), values=(float(gap),), seeds=(0,),
        what="Largest difference of a logit between a cut model and the original with those neurons zeroed",
    )  # fmt: skip


@contextmanager
def _zeroed(model: nn.Module, kept: Kept) -> Iterator[Any]:
    """Inside, the columns of `down_proj` that `kept` does not keep are zero."""
    weights: list[Any] = [block.get_submodule("mlp.down_proj").weight for block in decoder.find(model).blocks]
    before = [weight_DF.detach().clone() for weight_DF in weights]
    for weight_DF, stays_F in zip(weights, kept.ffn_LF, strict=True):
        gone_F = torch.ones(weight_DF.shape[1], dtype=torch.bool)
        gone_F[stays_F] = False
        weight_DF.data[:, gone_F] = 0
    yield model
    for weight_DF, before_DF in zip(weights, before, strict=True):
        weight_DF.data.copy_(before_DF)


def _ranking() -> dict[str, Any]:
    return SETTINGS | {
        "share": SHARE, "candidates": CANDIDATES, "batch_size": BATCH_SIZE, "training_seq_len": TRAINING_SEQ_LEN,
        "lr": LR, "short_steps": SHORT_STEPS, "long_steps": LONG_STEPS,
    }  # fmt: skip


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(Row(**{"kind": "claim", "seeds": SEEDS, "settings": SETTINGS, **fields}))
