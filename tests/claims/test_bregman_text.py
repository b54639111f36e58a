"""Two domains one after the other with SmolLM2: what the terms of Wang et al. (2024) keep of the first.

German manual pages, then code. What is compared is how far the held-out loss on German rises while code is learnt, and
how far that on code falls; 5,000 tokens of each, at a rate at which nearly all of the German is lost again where
nothing is held; half of it loses far less, twice of it harms both texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from bench import results
from bench.results import Row, Target

from command import overhaul

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

SEEDS = (0, 1, 2)
HOW = ("--tasks", "manpages-de", "stdlib", "--steps", "20", "--batch-size", "2", "--seq-len", "128", "--lr", "2e-4",
       "--optimizer", "adamw", "--warmup", "0.1", "--heldout", "16", "--save-every", "0")  # fmt: skip
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "finetune": ("nothing held", ("--output-term", "none")),
    "er": ("replay of text", ("--output-term", "er", "--alpha", "1", "--memory", "64")),
    "kl-replay": ("KL to the model before, on replayed text",
                  ("--output-term", "kl-replay", "--alpha", "1", "--memory", "64", "--temperature", "1")),
    "l2": ("L2 to the weights before", ("--output-term", "none", "--weight-term", "l2", "--beta", "1")),
    "ewc": ("EWC", ("--output-term", "none", "--weight-term", "ewc", "--fisher", "empirical", "--fisher-examples", "32",
                    "--beta", "1000")),
}  # fmt: skip
SETTINGS = {"model": "smollm2-135m", "tasks": "manpages-de, stdlib", "flags": " ".join(HOW[3:])}


@pytest.fixture(scope="module")
def rises(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """`rises("er")` -> how far the loss on German rises while code is learnt, of each seed; recorded."""
    root = tmp_path_factory.mktemp("texts")

    @cache
    def of(name: str) -> list[float]:
        told, flags = METHODS[name]
        found = [_losses(root / f"{name}-{seed}", seed, flags) for seed in SEEDS]
        rise = [after[0] - between[0] for _, between, after in found]
        gain = [between[1] - after[1] for _, between, after in found]
        results.record([
            _row(f"rise-{name}", f"Rise of the loss on German while code is learnt, {told}", rise),
            _row(f"gain-{name}", f"Fall of the loss on code while it is learnt, {told}", gain, Target(">", 0)),
        ])  # fmt: skip
        return rise

    return of


def _losses(out: Path, seed: int, flags: Sequence[str]) -> list[list[float]]:
    """On both texts, before, after the first and after the second."""
    done = overhaul("learn", "bregman", "smollm2-135m", "-o", out, *HOW, "--seed", seed, *flags)
    assert done.code == 0, done.err
    tables = json.loads((out / "overhaul.json").read_text())["tables"]
    (told,) = [table for table in tables if table["title"].startswith("Held-out loss on every text")]
    return [[float(loss) for loss in row[1:]] for row in told["rows"]]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "finetune"])
def test_the_first_text_is_lost_less_than_without_anything_held(rises: Callable[[str], list[float]], name: str):
    kept = [free - held for free, held in zip(rises("finetune"), rises(name), strict=True)]
    row = _row(f"kept-{name}", f"Rise that is saved, {METHODS[name][0]}", kept, Target(">", 0))
    results.record([row])
    results.hold(row)


def _row(name: str, what: str, values: Sequence[float], target: Target | None = None) -> Row:
    told = {"kind": "claim", "unit": "nats", "seeds": SEEDS, "settings": SETTINGS}
    return Row(id=f"learn-bregman/text-{name}", what=what, values=tuple(values), target=target, **told)
