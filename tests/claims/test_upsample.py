"""Domain upsampling (Blakeney et al., 2024) on small models: is a longer last part better for the domains?

Llamas of four layers, trained from random weights on Wikipedia with code and generated problems among it; in the last
part the small texts have more. All branches end with as many tokens, under one schedule.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench import results
from bench.results import Row, Target

from claims.extending import Extended, extended, write_blank
from command import overhaul
from overhaul.extend.upsample import Upsampling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

WEB, CODE = "boolq-passages", "stdlib"
PARTS = (0.05, 0.1, 0.2, 0.3)
SEEDS = (0, 1, 2)
STEPS = 600
HOW: dict[str, Any] = {"batch_size": 8, "seq_len": 128, "lr": 1e-3, "save_every": 0, "schedule": "infinite"}
SETTINGS = {"model": "llama 4 x 128, 1,024 tokens", "steps": STEPS, **HOW, "heldout": "64x128"}
BORDERS = (0.0, 0.7, 0.8, 0.9, 0.95, 1.0)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arithmetic in words with worked answers, each another one."""
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    done = overhaul("data", "questions", "-o", file, "--kinds", "arithmetic", "--count", "4000", "--largest", "99")
    assert done.code == 0, done.err
    return file


@pytest.fixture(scope="module")
def branches(problems: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[dict[str, float]]]:
    """Losses by text at the end of every branch, by how long the last part was; 0 is the run without a change."""
    root = tmp_path_factory.mktemp("upsample")
    blank = write_blank(root / "blank", (WEB, CODE))
    base, last = (f"{CODE}=0.05", f"{problems}=0.05"), (f"{CODE}=0.35", f"{problems}=0.35")
    found: dict[float, list[dict[str, float]]] = {part: [] for part in (0.0, *PARTS)}

    def run(model: Path, out: Path, begins: float, ends: float, seed: int, **chosen: Any) -> Extended:
        method = Upsampling(
            **HOW, steps=round((ends - begins) * STEPS), part=(begins, ends), go_on=begins > 0,
            from_scratch=begins == 0, keep_state=ends < 1, mix=base, **chosen,
        )  # fmt: skip
        return extended(model, out, method, data=WEB, watch=(WEB, CODE, str(problems)), seed=seed)

    for seed in SEEDS:
        trunk = blank
        for begins, ends in pairwise(BORDERS):
            part = round(1 - begins, 2)
            if part in PARTS:
                branch = run(trunk, root / f"{seed}-{part}", begins, 1.0, seed, last=part, last_mix=last)
                found[part].append(branch.after)
            stem = run(trunk, root / f"{seed}-trunk-{ends}", begins, ends, seed, last=0.05, last_mix=base)
            trunk = root / f"{seed}-trunk-{ends}"
        found[0.0].append(stem.after)
    results.record(
        _row(id=f"extend-upsample/{name}-{part:g}", values=tuple(losses[text] for losses in of),
             what=f"Loss on {told}, " + (f"last {part:.0%} upsampled" if part else "not upsampled"))
        for part, of in found.items()
        for name, told, text in (("problems", "problems", problems.name), ("code", "code", CODE), ("web", "web", WEB))
    )  # fmt: skip
    return found


def _domain(losses: dict[str, float], problems: Path) -> float:
    return statistics.fmean((losses[CODE], losses[problems.name]))


def test_a_longer_last_part_is_better_for_the_domains_up_to_a_fifth(branches, problems: Path):
    lengths = (0.0, 0.05, 0.1, 0.2)
    steps = [
        _domain(shorter, problems) - _domain(longer, problems)
        for one, other in pairwise(lengths)
        for shorter, longer in zip(branches[one], branches[other], strict=True)
    ]
    results.hold(
        _row(id="extend-upsample/monotone", values=(min(steps),), seeds=(), target=Target(">", 0),
             what="Loss on the domains less that after a longer last part, 0 to 5, 10, 20%: smallest of all seeds")
    )  # fmt: skip


def test_a_fifth_of_the_tokens_is_worth_five_per_cent_of_the_loss(branches, problems: Path):
    pairs = list(zip(branches[0.2], branches[0.0], strict=True))
    results.record([
        _row(id="extend-upsample/web-cost", target=None,
             what="Loss on web text with the last 20% upsampled less that without",
             values=tuple(with_[WEB] - without[WEB] for with_, without in pairs)),
    ])  # fmt: skip

    results.hold(
        _row(id="extend-upsample/gain", unit="share", target=Target(">=", 0.05),
             what="Fall of the loss on the domains by upsampling in the last 20%",
             values=tuple(1 - _domain(with_, problems) / _domain(without, problems) for with_, without in pairs))
    )  # fmt: skip


def _row(**fields: Any) -> Row:
    return Row(**{"kind": "claim", "unit": "nats", "seeds": SEEDS, "settings": SETTINGS, **fields})
