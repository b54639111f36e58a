"""RandLoRA's question (Albert et al., 2025): what limits an adapter at a given number of trained numbers, its rank?

In closed form on matrices, then on SmolLM2-135M with text whose commonest words were exchanged at random, a mapping
that no small change of few directions gives. Rates are chosen for each method from three, on a seed of its own.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import Tensor, nn

from overhaul import artifact, evaluate, machine
from overhaul.adapt.lora import LoRA
from overhaul.adapt.randlora import RandLoRA
from overhaul.adapt.vera import VeRA
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.interop.peft import write_adapter
from overhaul.layers.lora import nearest_lora
from overhaul.layers.randlora import scaled_bases
from overhaul.random_bases import RandLoRABases
from overhaul.stream import Batch, Repeat, Rows
from overhaul.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

SIZE, BASE_RANK, LORA_RANK = 64, 10, 4
"""A square matrix, for which RandLoRA trains 518 numbers and LoRA 512."""
MATRIX_SEEDS = tuple(range(5))

CORPUS, EXCHANGED = "boolq-passages", 256
STEPS, BATCH_SIZE, SEQ_LEN, LAST = 32, 2, 128, 8
SEEDS, TUNING_SEED = (0, 1, 2), 100
DTYPE = machine.compute_dtype("auto", torch.device("cpu"))
HOW: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "save_every": 0}
METHODS = {
    "randlora": (partial(RandLoRA, rank=64, alpha=1280), (1e-4, 3e-4, 1e-3)),
    "lora": (partial(LoRA, rank=3, alpha=6), (3e-3, 1e-2, 3e-2)),
    "vera": (partial(VeRA, rank=256), (3e-2, 1e-1, 3e-1)),
}
"""RandLoRA and LoRA train as many numbers to within a percent; VeRA cannot have as many."""


def test_full_rank_fits_a_flat_spectrum_better_and_a_few_directions_worse():
    flat, few = [], []
    for seed in MATRIX_SEEDS:
        torch.manual_seed(seed)
        rotation = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64)).Q
        low_rank = torch.randn(SIZE, LORA_RANK, dtype=torch.float64) @ torch.randn(LORA_RANK, SIZE, dtype=torch.float64)
        base = nn.Linear(SIZE, SIZE, bias=False)
        flat.append(_residual(rotation, seed) / nearest_lora(base, rotation, LORA_RANK)[1])
        few.append(_residual(low_rank, seed) - nearest_lora(base, low_rank, LORA_RANK)[1])

    settings = {"size": SIZE, "randlora_rank": BASE_RANK, "lora_rank": LORA_RANK}
    what = f"an increment of {SIZE} x {SIZE} that is not fitted, at 518 numbers against LoRA's 512"
    _check(id="adapt-randlora/fit-flat", what=f"Norm of {what}: a rotation, over that of the best LoRA", unit="",
           values=tuple(flat), target=Target("<", 1), seeds=MATRIX_SEEDS, settings=settings)  # fmt: skip
    _check(id="adapt-randlora/fit-low-rank", unit="",
           what=f"Share of {what}: one of rank {LORA_RANK}, less that of the best LoRA",
           values=tuple(few), target=Target(">", 0), seeds=MATRIX_SEEDS, settings=settings)  # fmt: skip


def _residual(target_OI: Tensor, seed: int, rounds: int = 200) -> float:
    """Share of the norm of a change that RandLoRA leaves out, by alternating least squares in lambda and gamma."""
    A_Rd, B_DM = (part.double() for part in RandLoRABases.draw([(SIZE, SIZE)], BASE_RANK, key=seed).part(SIZE, SIZE))
    num_bases = B_DM.shape[1] // BASE_RANK
    B_DRN = B_DM.view(SIZE, BASE_RANK, num_bases)
    lambda_RN = torch.ones(BASE_RANK, num_bases, dtype=torch.float64)
    gamma_Nd = torch.ones(num_bases, SIZE, dtype=torch.float64)
    for _ in range(rounds):
        terms = torch.einsum("okn,kj,nj->ojkn", B_DRN, A_Rd, gamma_Nd).flatten(2).flatten(0, 1)
        lambda_RN = torch.linalg.lstsq(terms, target_OI.flatten()[:, None]).solution.view(BASE_RANK, num_bases)
        per_column = torch.einsum("okn,kn,kj->jon", B_DRN, lambda_RN, A_Rd)
        gamma_Nd = torch.linalg.lstsq(per_column, target_OI.t()[:, :, None]).solution[:, :, 0].t()
    fitted_OI = B_DM @ scaled_bases(A_Rd, lambda_RN, gamma_Nd, 1.0)
    return float((target_OI - fitted_OI).norm() / target_OI.norm())


class Exchange:
    """The model, and text in which every common word stands for another one."""

    def __init__(self, smol: Path) -> None:
        self.dense = artifact.load(smol, dtype=machine.weights_dtype(DTYPE))
        text = Data(open_corpus(CorpusSpec(path=CORPUS)), self.dense.processor, 0)
        train_NT = text.windows("train", seq_len=SEQ_LEN, limit=2 * STEPS * BATCH_SIZE)
        heldout_NT = text.windows("heldout", seq_len=SEQ_LEN, limit=32)
        counts_V = torch.bincount(train_NT.flatten(), minlength=self.dense.model.config.vocab_size)  # pyright: ignore
        common = counts_V.topk(EXCHANGED).indices
        words_V = torch.arange(len(counts_V))
        words_V[common] = common[torch.randperm(EXCHANGED, generator=torch.Generator().manual_seed(0))]
        self.train_NT, self.heldout_NT = words_V[train_NT], words_V[heldout_NT]

    def losses(self, name: str, lr: float, seed: int) -> tuple[float, float, int]:
        """Mean training loss of the last steps and the held-out loss, in nats a token; how many numbers are trained."""
        make, _ = METHODS[name]
        method = make(**HOW, lr=lr)
        order = torch.randperm(len(self.train_NT), generator=torch.Generator().manual_seed(seed))
        rows = Rows([{"input_ids": w, "labels": w} for w in self.train_NT[order]], name="exchanged", fingerprint="")
        data: Any = SimpleNamespace(training=lambda settings: Batch(Repeat(rows), batch_size=settings.batch_size))
        machine.seed_everything(seed)
        plan = method.plan(copy.deepcopy(self.dense.model), data)
        num_trained = plan.num_trained
        history = train(plan, method, seed=seed, dtype=DTYPE, quiet=True)
        heldout = evaluate.perplexity(plan.model.eval(), self.heldout_NT, dtype=DTYPE, batch_size=4).estimate.value
        last = [point["loss"] for point in history.points[-LAST:]]
        return sum(last) / len(last), math.log(heldout), num_trained


@pytest.fixture(scope="module")
def found(smol: Path) -> dict[str, list[tuple[float, float, int]]]:
    """(training loss, held-out loss, trained numbers) by method, one a seed; the rate is the best on another seed."""
    task = Exchange(smol)
    losses, chosen = {}, {}
    for name, (_, rates) in METHODS.items():
        chosen[name] = min(rates, key=lambda lr: task.losses(name, lr, TUNING_SEED)[0])
        losses[name] = [task.losses(name, chosen[name], seed) for seed in SEEDS]
    settings = _settings(chosen)
    results.record(
        Row(id=f"adapt-{'vera' if name == 'vera' else 'randlora'}/{part}-{name}",
            kind="claim", unit="nats", seeds=SEEDS, settings=settings,
            what=f"{what} on text with {EXCHANGED} words exchanged: {name}, {losses[name][0][2]:,} numbers",
            values=tuple(loss[index] for loss in losses[name]))
        for name in METHODS
        for index, (part, what) in enumerate({"loss": "Last training loss", "heldout": "Held-out loss"}.items())
    )  # fmt: skip
    return losses


def _settings(chosen: dict[str, float]) -> dict[str, Any]:
    return {"model": "smollm2-135m", "corpus": CORPUS, "exchanged": EXCHANGED, **HOW, "dtype": str(DTYPE)} | {
        f"lr_{name}": lr for name, lr in chosen.items()
    }


@pytest.mark.parametrize(("part", "index"), [("Last training loss", 0), ("Held-out loss", 1)])
def test_full_rank_learns_a_hard_mapping_better_at_the_same_number_of_trained_numbers(found, part, index):
    gains = [1 - own[index] / other[index] for own, other in zip(found["randlora"], found["lora"], strict=True)]

    _check(id=f"adapt-randlora/{'training' if index == 0 else 'heldout'}-gain", unit="share", values=tuple(gains),
           what=f"{part}: how much lower RandLoRA's is than LoRA's", target=Target(">=", 0.01), seeds=SEEDS,
           settings=_settings({}))  # fmt: skip


def test_an_adapter_file_holds_what_was_trained(smol: Path, tmp_path: Path):
    model: Any = artifact.load(smol).model
    trained = RandLoRA().attach(model, [n for n, m in model.model.layers.named_modules(prefix="model.layers")
                                        if isinstance(m, nn.Linear)])  # fmt: skip
    write_adapter(model, smol, tmp_path)
    share = (tmp_path / "adapter_model.safetensors").stat().st_size / sum(p.nbytes for p in trained)

    _check(id="adapt-randlora/file", unit="", values=(share,), target=Target("<", 1.2), seeds=(0,),
           what="Bytes of the adapter file over those of the trained numbers", settings={"rank": 32})  # fmt: skip


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(Row(kind="claim", **fields))
