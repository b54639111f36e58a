"""Which task a text is of, by its keys alone (Peng et al., 2024): with an encoder of sentences, and without one.

German and English manual pages, code, news, and sums in words; pieces of 48 words, four keys a task. What is compared
is the share of held-out pieces whose nearest key is one of their own task, a piece at a time, and how many of the 20
keys are ever the nearest: with groups and masking as they are meant, and without the one, the other, and both.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from bench import results
from bench.results import Row, Target
from torch import Tensor

from overhaul import artifact
from overhaul.encoders import OwnStates, SentenceEncoder
from overhaul.labelled_texts import open_classes
from overhaul.learn.slm import Slm
from overhaul.learners.slm import key_plan
from overhaul.pretrained import DEFAULT, resolve
from overhaul.retrieval import Keys, find, first_keys
from overhaul.stream import Rows
from overhaul.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEEDS = (0, 1, 2)
CORPORA = ("manpages-de", "manpages-en", "stdlib", "xsum")
WORDS, TEXTS, HELD = 48, 96, 40
"""Of a piece; pieces of a task that are learnt from and held out. A seed learns from two thirds of them."""
KEYS = {
    "meant": {},
    "one-group": {"groups": 1},
    "unmasked": {"masked": 0.0},
    "neither": {"groups": 1, "masked": 0.0},
}
TOLD = {"meant": "six groups, masked", "one-group": "one group", "unmasked": "nothing masked", "neither": "neither"}
ENCODERS = {"minilm": "MiniLM", "own": "the model's own states"}


class Queries(NamedTuple):
    """Of one task, less the mean of novels.

    Attributes:
        train_ND: of the pieces that keys are learnt from.
        heldout_ND: of the others.
    """

    train_ND: Tensor
    heldout_ND: Tensor


def _sums() -> list[str]:
    dice = random.Random(0)
    asked = ("What is {} plus {}?", "{} apples and {} more are how many?", "From {} take {}. What is left?",
             "How much is {} times {}, and why?")  # fmt: skip
    pairs = [(dice.randint(10, 999), dice.randint(2, 99)) for _ in range(TEXTS + HELD)]
    return [asked[number % 4].format(*pair) for number, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def queries() -> Callable[[str], list[Queries]]:
    """`queries("minilm")` -> of each task."""
    made = artifact.load(DEFAULT, dtype=torch.float32)
    tokenizer: Any = made.processor
    parts = [
        (one.train.texts, one.heldout.texts)
        for one in open_classes(CORPORA, words=WORDS, limit=TEXTS, heldout=HELD)
    ]  # fmt: skip
    sums = _sums()
    parts.append((tuple(sums[:TEXTS]), tuple(sums[TEXTS:])))
    (novels,) = open_classes(["sample"], words=WORDS, limit=TEXTS, heldout=HELD)

    @cache
    def of(name: str) -> list[Queries]:
        encoder = OwnStates(made.model) if name == "own" else SentenceEncoder(resolve("all-minilm-l6-v2"), tokenizer)

        @torch.no_grad()
        def known_by(texts: tuple[str, ...]) -> Tensor:
            ids = [torch.tensor(tokenizer(text)["input_ids"][:64]) for text in texts]
            return torch.cat([encoder(ids[at : at + 8]) for at in range(0, len(ids), 8)])

        centre_D = known_by(novels.train.texts).mean(dim=0)
        return [Queries(known_by(train) - centre_D, known_by(held) - centre_D) for train, held in parts]

    return of


def _found(tasks: list[Queries], how: dict[str, Any], seed: int) -> tuple[float, int]:
    """The share of held-out pieces that find a key of their own task, and how many keys are ever the nearest."""
    method, keys = Slm(**how), []
    for number, task in enumerate(tasks):
        torch.manual_seed(seed)
        chosen_ND = task.train_ND[torch.randperm(TEXTS)[: TEXTS * 2 // 3]]
        learnt = Keys(first_keys(chosen_ND, method.groups, method.entries))
        rows = Rows([{"queries": one} for one in chosen_ND], name=str(number), fingerprint=str(seed))
        train(key_plan(method, learnt, rows, seed=seed), method, quiet=True)
        keys.append(learnt.keys_GPC.detach())
    keys_GPC, right, winners = torch.cat(keys, dim=1), [], set[int]()
    for number, task in enumerate(tasks):
        nearest_N = find(task.heldout_ND, keys_GPC, method.top_k).entries_BK[:, 0]
        right.append((nearest_N // method.entries == number).double().mean())
        winners |= set(nearest_N.tolist())
    return float(torch.stack(right).mean()), len(winners)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_texts_find_the_keys_of_their_task(queries: Callable[[str], list[Queries]], encoder: str):
    rows: list[Row] = []
    for name, how in KEYS.items():
        found = [_found(queries(encoder), how, seed) for seed in SEEDS]
        settings = {"model": DEFAULT, "encoder": encoder, "tasks": ", ".join((*CORPORA, "sums")), **how}
        told: dict[str, Any] = {"kind": "claim", "seeds": SEEDS, "settings": settings}
        target = Target(">=", 0.95) if name == "meant" else None
        rows += [
            Row(id=f"learn-slm/finds-{encoder}-{name}", what=f"Pieces that find their task, {ENCODERS[encoder]}, "
                f"{TOLD[name]}", values=tuple(share for share, _ in found), unit="share", target=target, **told),
            Row(id=f"learn-slm/winners-{encoder}-{name}", what=f"Keys of 20 that are ever the nearest, "
                f"{ENCODERS[encoder]}, {TOLD[name]}", values=tuple(float(n) for _, n in found), unit="", **told),
        ]  # fmt: skip
    results.record(rows)
    for row in rows:
        results.hold(row)
