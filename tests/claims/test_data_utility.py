"""What a text is worth (Blakeney et al., 2024, section 4.3): does the last fifth tell what whole runs without it tell?

Llamas of four layers on four texts. Whole runs from random weights, each without one of the texts, are the reference;
the probe leaves each out of the last fifth of one run that had all.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bench import results
from bench.results import Row, Target
from scipy.stats import spearmanr

from claims.extending import extended, write_blank, write_problems
from command import overhaul
from overhaul.extend.upsample import Upsampling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

WEB, CODE, PAGES = "boolq-passages", "stdlib", "manpages-en"
TOLD = {"web": "web text", "code": "code", "pages": "manual pages", "problems": "problems"}
SHARE, LAST = 0.25, 0.2
"""Of each text, in all runs; and of a run, the part that the probe trains."""
STEPS, BATCH, SEQ_LEN, RATE = 600, 8, 128, 1e-3
SEEDS = (0, 1, 2)
SETTINGS = {"model": "llama 4 x 128, 1,024 tokens", "steps": STEPS, "batch_size": BATCH, "seq_len": SEQ_LEN, "lr": RATE,
            "share of each text": SHARE, "last": LAST, "heldout": f"64x{SEQ_LEN}"}  # fmt: skip

Utilities = dict[tuple[str, str], float]
"""Nats a token, by what was left out and by the text that is read."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """One seed's utilities by both ways, and the tokens that each has read."""

    whole: Utilities
    probe: Utilities
    tokens: tuple[int, int]

    def agreement(self, texts: list[str]) -> float:
        """Spearman's correlation between both rankings of the texts, by their mean utility on all."""
        both = ([_mean(of, text, texts) for text in texts] for of in (self.whole, self.probe))
        return float(spearmanr(*both).statistic)

    def agreement_of_pairs(self) -> float:
        """The same of all utilities of one text on one text."""
        return float(spearmanr(*([of[pair] for pair in self.whole] for of in (self.whole, self.probe))).statistic)


def _mean(utilities: Utilities, left_out: str, texts: list[str]) -> float:
    return statistics.fmean(utilities[left_out, text] for text in texts)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems(tmp_path_factory.mktemp("problems"))


@pytest.fixture(scope="module")
def texts(problems: Path) -> list[str]:
    return [WEB, CODE, PAGES, problems.name]


@pytest.fixture(scope="module")
def ranked(problems: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Ranked]:
    root = tmp_path_factory.mktemp("utility")
    blank = write_blank(root / "blank", (WEB, CODE, PAGES))
    mix = tuple(f"{path}={SHARE}" for path in (CODE, PAGES, problems))
    found = []
    for seed in SEEDS:
        trunk = root / f"trunk-{seed}"
        method = Upsampling(
            mix=mix, last_mix=mix, last=LAST, part=(0.0, 1 - LAST), steps=round((1 - LAST) * STEPS), batch_size=BATCH,
            seq_len=SEQ_LEN, lr=RATE, schedule="infinite", from_scratch=True, keep_state=True, save_every=0,
        )  # fmt: skip
        extended(blank, trunk, method, data=WEB, watch=(), seed=seed)
        last = round(LAST * STEPS)
        whole, probe = _utilities(blank, mix, STEPS, seed), _utilities(trunk, mix, last, seed, "--go-on")
        runs = len(texts) + 1
        found.append(Ranked(whole, probe, (runs * STEPS, runs * last)))
    results.record(
        _row(id=f"measure-data-utility/{way}-{name}", what=f"Utility of {told} on all four texts, {how}",
             values=tuple(_mean(getattr(one, way), text, texts) for one in found))
        for way, how in (("whole", "whole runs without it"), ("probe", "the last fifth without it"))
        for (name, told), text in zip(TOLD.items(), texts, strict=True)
    )  # fmt: skip
    return found


def _utilities(model: Path, mix: tuple[str, ...], steps: int, seed: int, *more: str) -> Utilities:
    """What the command says of every pair of texts."""
    done = overhaul(
        "measure", "data-utility", model, "--data", WEB, "--last-mix", *mix, "--steps", steps, "--batch-size", BATCH,
        "--seq-len", SEQ_LEN, "--lr", RATE, "--runs", 1, "--windows", 64, "--seed", seed, "--json", *more,
    )  # fmt: skip
    assert done.code == 0, done.err
    named = (row["metric"].removeprefix("utility of ").split(" on ") for row in json.loads(done.out)["rows"])
    values = (row["value"] for row in json.loads(done.out)["rows"])
    return {(left_out, text): value for (left_out, text), value in zip(named, values, strict=True)}


def test_the_last_fifth_ranks_texts_as_whole_runs_do(ranked: list[Ranked], texts: list[str]):
    row = _row(id="measure-data-utility/agreement", unit="", target=Target(">=", 0.8),
               what="Spearman's correlation between both rankings of the four texts",
               values=tuple(one.agreement(texts) for one in ranked))  # fmt: skip
    pairs = _row(id="measure-data-utility/agreement-of-pairs", unit="", target=Target(">=", 0.8),
                 what="Spearman's correlation over all sixteen utilities of a text on a text",
                 values=tuple(one.agreement_of_pairs() for one in ranked))  # fmt: skip
    cost = _row(id="measure-data-utility/cost", unit="share", seeds=(), target=Target("<=", 0.25),
                what="Tokens that the probe reads over those of whole runs, the trunk apart",
                values=(ranked[0].tokens[1] / ranked[0].tokens[0],))  # fmt: skip
    results.record((row, pairs, cost))
    for one in (row, pairs, cost):
        results.hold(one)


def test_problems_suffer_most_from_the_loss_of_problems(ranked: list[Ranked], texts: list[str], problems: Path):
    def lead(utilities: Utilities) -> float:
        own = utilities[problems.name, problems.name]
        return own - max(utilities[text, problems.name] for text in texts if text != problems.name)

    results.hold(
        _row(id="measure-data-utility/problems-lead", target=Target(">", 0),
             what="Utility of problems on themselves less that of the next best text, by the probe",
             values=tuple(lead(one.probe) for one in ranked))
    )  # fmt: skip


def _row(**fields: Any) -> Row:
    return Row(**{"kind": "claim", "unit": "nats", "seeds": SEEDS, "settings": SETTINGS, **fields})
