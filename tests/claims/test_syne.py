"""Llama-3-SynE's two stages (Chen et al., 2024) on SmolLM2: a language, then a skill, and what each part is needed for.

German manual pages are the new language, passages of English Wikipedia the old one, conversions of units the skill. The
controls have as many tokens: one goes on with the first stage instead of the second, one has no English in either, and
one reads the German pages easy first, in both stages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bench import results
from bench.results import Row, Target

from claims.extending import SEQ_LEN, Extended, extended
from command import overhaul
from overhaul.extend.syne import Syne

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

NEW, OLD = "manpages-de", "boolq-passages"
SEEDS = (0,)
STEPS = (50, 100)
HOW: dict[str, Any] = {"batch_size": 4, "seq_len": SEQ_LEN, "lr": 3e-4, "save_every": 0}
ENGLISH, QUESTIONS = 0.3, 0.4
SETTINGS = {"model": "smollm2-135m", "new": NEW, "old": OLD, "steps": STEPS, **HOW, "english": ENGLISH,
            "questions": QUESTIONS, "heldout": f"32x{SEQ_LEN}"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arm:
    """Both stages of a seed, and the share of questions that were answered at the end."""

    first: Extended
    second: Extended
    right: float

    def change(self, text: str) -> float:
        """Of the loss on a text over both stages, as a share of the loss before."""
        return self.second.after[text] / self.first.before[text] - 1


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("units") / "units.jsonl"
    done = overhaul("data", "questions", "-o", file, "--kinds", "units", "--largest", "20", "--count", "1500",
                    "--heldout", "100")  # fmt: skip
    assert done.code == 0, done.err
    return file


def _right(model: Path, units: Path) -> float:
    """Share of the held-out questions that are answered exactly."""
    found = overhaul("measure", "answers", model, "--task", units.with_suffix(".heldout.jsonl"), "--json")
    assert found.code == 0, found.err
    return json.loads(found.out)["rows"][0]["value"]


@pytest.fixture(scope="module")
def before(smol: Path, units: Path) -> float:
    return _right(smol, units)


@pytest.fixture(scope="module")
def arms(smol: Path, units: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Arm]]:
    root, asked = tmp_path_factory.mktemp("syne"), f"{units}={QUESTIONS}"
    english = f"{OLD}={ENGLISH}"
    mixes = {
        "both": ((english,), (english, asked), "shuffled"),
        "first": ((english,), (english,), "shuffled"),
        "german": ((), (asked,), "shuffled"),
        "easy": ((english,), (english, asked), "easy-first"),
    }
    found: dict[str, list[Arm]] = {name: [] for name in mixes}
    for name, (first, second, order) in mixes.items():
        for seed in SEEDS:
            language, skill = root / f"{name}-{seed}-1", root / f"{name}-{seed}-2"
            common: dict[str, Any] = {"data": NEW, "watch": (NEW, OLD), "seed": seed, "windows": 32}
            stage = Syne(**HOW, steps=STEPS[0], mix=first, order=order, schedule="constant", keep_state=True)
            one = extended(smol, language, stage, **common)
            stage = Syne(**HOW, steps=STEPS[1], mix=second, order=order, schedule="wsd", decay=0.3, go_on=True)
            two = extended(language, skill, stage, **common)
            found[name].append(Arm(one, two, _right(skill, units)))
        told = {"both": "two stages", "first": "the first stage alone", "german": "no English",
                "easy": "two stages, easy first"}[name]  # fmt: skip
        results.record([
            _row(id=f"extend-syne/german-{name}", what=f"Change of the German loss, {told}",
                 values=tuple(arm.change(NEW) for arm in found[name])),
            _row(id=f"extend-syne/english-{name}", what=f"Change of the English loss, {told}",
                 values=tuple(arm.change(OLD) for arm in found[name])),
            _row(id=f"extend-syne/right-{name}", what=f"Questions answered exactly, {told}",
                 values=tuple(arm.right for arm in found[name])),
        ])  # fmt: skip
    return found


def test_a_language_and_a_skill_are_learnt_and_the_old_language_kept(arms, before: float):
    rows = (
        _row(id="extend-syne/language", target=Target("<=", -0.15), what="Change of the German loss over both stages",
             values=tuple(arm.change(NEW) for arm in arms["both"])),
        _row(id="extend-syne/skill", target=Target(">=", 0.2), what="Rise of the questions answered over both stages",
             values=tuple(arm.right - before for arm in arms["both"])),
        _row(id="extend-syne/kept", target=Target("<=", 0.03), what="Change of the English loss over both stages",
             values=tuple(arm.change(OLD) for arm in arms["both"])),
    )  # fmt: skip
    results.record(rows)
    for row in rows:
        results.hold(row)


def test_without_the_second_stage_the_skill_is_not_learnt(arms, before: float):
    results.hold(
        _row(id="extend-syne/without-second", target=Target("<", 0.05), what="The same without the second stage",
             values=tuple(arm.right - before for arm in arms["first"]))
    )  # fmt: skip


def test_without_english_it_is_lost(arms):
    rises = [(both.change(OLD), german.change(OLD)) for both, german in zip(arms["both"], arms["german"], strict=True)]
    results.hold(
        _row(id="extend-syne/without-english", target=Target(">", 0),
             what="Rise of the English loss without English less twice that with it, if it rises",
             values=tuple(german - 2 * max(both, 0.0) for both, german in rises))
    )  # fmt: skip


def _row(**fields: Any) -> Row:
    return Row(**{"kind": "claim", "unit": "share", "seeds": SEEDS, "settings": SETTINGS, **fields})
