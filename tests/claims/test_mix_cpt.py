"""Mix-CPT, stage one (Jiang et al., 2025): is less of the old lost, and the new still learnt, with swapped logits?

SmolLM2-135M goes on with German manual pages, the same windows in the same order at one rate, under four objectives:
cross-entropy alone, with self-distillation, with logit-swap self-distillation, and that alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench import results
from bench.results import Row, Target

from claims.extending import SEQ_LEN, Extended, extended
from overhaul.extend.mix_cpt import MixCPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

GENERAL, DOMAIN = "boolq-passages", "manpages-de"
SEEDS = (0, 1)
HOW: dict[str, Any] = {"steps": 40, "batch_size": 2, "seq_len": SEQ_LEN, "lr": 3e-4, "save_every": 0}
WINDOWS = 32
SETTINGS = {"model": "smollm2-135m", "domain": DOMAIN, "general": GENERAL, **HOW, "heldout": f"{WINDOWS}x{SEQ_LEN}"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ce": ("cross-entropy alone", {"kl_weight": 0.0}),
    "ce-kd": ("cross-entropy and self-distillation", {"kl_weight": 1.0, "swap": False}),
    "ce-lssd": ("cross-entropy and logit-swap self-distillation", {"kl_weight": 1.0}),
    "lssd": ("logit-swap self-distillation alone", {"kl_weight": 1.0, "ce_weight": 0.0}),
}


@pytest.fixture(scope="module")
def runs(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Extended]]:
    root, found = tmp_path_factory.mktemp("mix-cpt"), {}
    for name, (told, chosen) in ARMS.items():
        found[name] = [
            extended(smol, root / f"{name}-{seed}", MixCPT(**HOW, **chosen), data=DOMAIN, seed=seed,
                     watch=(GENERAL, DOMAIN), windows=WINDOWS)
            for seed in SEEDS
        ]  # fmt: skip
        results.record(
            _row(id=f"extend-mix-cpt/{kind}-{name}", what=f"Change of the loss on {what} text, {told}",
                 values=tuple(run.after[text] - run.before[text] for run in found[name]))
            for kind, what, text in (("general", "general", GENERAL), ("domain", "domain", DOMAIN))
        )  # fmt: skip
    return found


@pytest.mark.parametrize("name", ["ce-lssd", "lssd"])
def test_less_of_the_old_is_lost(runs, name: str):
    def rise(run: Extended) -> float:
        return run.after[GENERAL] - run.before[GENERAL]

    assert all(rise(free) > 0 for free in runs["ce"])
    results.hold(
        _row(id=f"extend-mix-cpt/kept-{name}", unit="share", target=Target("<=", 0.7),
             what=f"Rise of the general loss over that of cross-entropy alone, {ARMS[name][0]}",
             values=tuple(rise(held) / rise(free) for held, free in zip(runs[name], runs["ce"], strict=True)))
    )  # fmt: skip


def test_swapping_lets_more_be_learnt_than_plain_self_distillation(runs):
    pairs = zip(runs["ce-kd"], runs["ce-lssd"], strict=True)

    results.hold(
        _row(id="extend-mix-cpt/swap-learns", target=Target(">", 0),
             what="Domain loss with plain self-distillation less that with swapped logits, beside cross-entropy",
             values=tuple(plain.after[DOMAIN] - swapped.after[DOMAIN] for plain, swapped in pairs))
    )  # fmt: skip


LONGER: dict[str, Any] = {**HOW, "steps": 120, "batch_size": 4}
LONGER_SEEDS = (0,)


def test_in_a_longer_run_it_does(smol: Path, tmp_path_factory: pytest.TempPathFactory):
    root, found = tmp_path_factory.mktemp("longer"), {}
    for name in ("ce-kd", "ce-lssd"):
        found[name] = [
            extended(smol, root / f"{name}-{seed}", MixCPT(**LONGER, **ARMS[name][1]), data=DOMAIN, seed=seed,
                     watch=(GENERAL, DOMAIN), windows=WINDOWS)
            for seed in LONGER_SEEDS
        ]  # fmt: skip
    common: dict[str, Any] = {"settings": {**SETTINGS, **LONGER}, "seeds": LONGER_SEEDS}
    results.record(
        _row(id=f"extend-mix-cpt/longer-{kind}-{name}", **common, values=tuple(r.after[t] - r.before[t] for r in runs),
             what=f"Change of the loss on {what} text in 120 steps of 512 tokens, {ARMS[name][0]}")
        for name, runs in found.items()
        for kind, what, t in (("general", "general", GENERAL), ("domain", "domain", DOMAIN))
    )  # fmt: skip
    pairs = zip(found["ce-kd"], found["ce-lssd"], strict=True)
    results.hold(
        _row(id="extend-mix-cpt/swap-learns-longer", target=Target(">", 0), **common,
             what="The same in 120 steps of 512 tokens: domain loss with plain self-distillation less that with swaps",
             values=tuple(plain.after[DOMAIN] - swapped.after[DOMAIN] for plain, swapped in pairs))
    )  # fmt: skip


def _row(**fields: Any) -> Row:
    return Row(**{"kind": "claim", "unit": "nats", "seeds": SEEDS, "settings": SETTINGS, **fields})
