"""Domain upsampling (Blakeney et al., 2024): is a longer last part better for the domains, and what does it cost?

Llamas of four layers, trained from random weights on Wikipedia with code and generated problems among it; in the last
part the small texts have more. All branches end with as many tokens, under one schedule. Then SmolLM2, which goes on.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench import results
from bench.results import Row, Target

from claims.extending import Extended, extended, write_blank, write_problems
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
    return write_problems(tmp_path_factory.mktemp("problems"))


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


SMOL_SEEDS = (0, 1)
SMOL_STEPS, SMOL_LAST = 120, 0.2
SMOL: dict[str, Any] = {"batch_size": 4, "seq_len": 128, "lr": 1e-4, "save_every": 0, "schedule": "infinite"}
SMOL_SETTINGS = {"model": "smollm2-135m", "steps": SMOL_STEPS, "last": SMOL_LAST, **SMOL, "heldout": "64x128"}


@pytest.fixture(scope="module")
def smollm2(smol: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Losses by text, before and at the end of both branches of a run that goes on with a real model."""
    root = tmp_path_factory.mktemp("smollm2")
    base, last = (f"{CODE}=0.05", f"{problems}=0.05"), (f"{CODE}=0.35", f"{problems}=0.35")
    common: dict[str, Any] = {"data": WEB, "watch": (WEB, CODE, str(problems))}
    found: dict[str, list[dict[str, float]]] = {"before": [], "without": [], "with": []}
    for seed in SMOL_SEEDS:
        trunk, border = root / f"{seed}-trunk", 1 - SMOL_LAST
        stem = Upsampling(**SMOL, mix=base, last_mix=last, last=SMOL_LAST, part=(0.0, border), keep_state=True,
                          steps=round(border * SMOL_STEPS))  # fmt: skip
        found["before"].append(extended(smol, trunk, stem, seed=seed, **common).before)
        for name, mix in (("without", base), ("with", last)):
            branch = Upsampling(**SMOL, mix=base, last_mix=mix, last=SMOL_LAST, part=(border, 1.0), go_on=True,
                                steps=round(SMOL_LAST * SMOL_STEPS))  # fmt: skip
            found[name].append(extended(trunk, root / f"{seed}-{name}", branch, seed=seed, **common).after)
    results.record(
        _smol_row(id=f"extend-upsample/smollm2-{name}-{text}", what=f"SmolLM2's loss on {text}, {when}",
                  values=tuple(losses[of] for losses in found[name]))
        for name, when in (("before", "before"), ("without", "not upsampled"), ("with", "last 20% upsampled"))
        for text, of in (("problems", problems.name), ("code", CODE), ("web", WEB))
    )  # fmt: skip
    return found


def test_smollm2_gains_on_the_domains_and_keeps_web_text(smollm2, problems: Path):
    pairs = list(zip(smollm2["without"], smollm2["with"], strict=True))
    rows = (
        _smol_row(id="extend-upsample/smollm2-gain", target=Target(">", 0),
                  what="SmolLM2's loss on the domains less that with the last 20% upsampled",
                  values=tuple(_domain(without, problems) - _domain(with_, problems) for without, with_ in pairs)),
        _smol_row(id="extend-upsample/smollm2-web-cost", target=Target("<=", 0.03),
                  what="SmolLM2's loss on web text with the last 20% upsampled less that without",
                  values=tuple(with_[WEB] - without[WEB] for without, with_ in pairs)),
    )  # fmt: skip
    results.record(rows)
    for row in rows:
        results.hold(row)


def _smol_row(**fields: Any) -> Row:
    return _row(**{"settings": SMOL_SETTINGS, "seeds": SMOL_SEEDS, **fields})


def _row(**fields: Any) -> Row:
    return Row(**{"kind": "claim", "unit": "nats", "seeds": SEEDS, "settings": SETTINGS, **fields})
