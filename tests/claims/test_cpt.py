"""Continual pre-training (Ibrahim et al., 2024): small models from scratch, then SmolLM2, from English to German.

The small ones are Llamas of four layers with a vocabulary of both languages: trained on English manual pages, they go
on with German ones, at one rate, with more and more of the English replayed. The union is trained on both from random
weights, for as many steps as all the others together. Everything goes through the command's own path: directories in,
directories out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench import results
from bench.results import Row, Target

from claims.extending import Extended, extended, first_points, write_blank
from overhaul.extend.cpt import ContinualPretraining

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

OLD, NEW = "manpages-en", "manpages-de"
SHARES = (0.01, 0.05, 0.25)
SEEDS = (0, 1, 2)
PEAK = 1e-3
HOW: dict[str, Any] = {"batch_size": 8, "seq_len": 128, "lr": PEAK, "save_every": 0}
BEFORE, AFTER, EVERY = 800, 400, 25
SETTINGS = {"model": "llama 4 x 128, 1,024 tokens", "old": OLD, "new": NEW, "steps": (BEFORE, AFTER), **HOW}


@dataclass(frozen=True, slots=True)
class Losses:
    """In nats a token, on held-out text."""

    old: float
    new: float

    @property
    def mean(self) -> float:
        """Of both, as the paper's AVG."""
        return (self.old + self.new) / 2


def _losses(run: Extended) -> Losses:
    return Losses(run.after[OLD], run.after[NEW])


def _arms() -> dict[str, ContinualPretraining]:
    """What is tried on the model that knows English; the union is not of it."""
    common = {**HOW, "steps": AFTER, "eval_every": EVERY}
    shares = {f"replay-{share:g}": {"replay": OLD, "replay_share": share} for share in SHARES}
    arms: dict[str, dict[str, Any]] = {"constant": {"schedule": "constant", "lr": PEAK / 10}, "replay-0": {}, **shares}
    return {name: ContinualPretraining(**{**common, **chosen}) for name, chosen in arms.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Extended]]:
    """Every arm on every seed; `english` is what they begin with."""
    root, found = tmp_path_factory.mktemp("cpt"), {name: [] for name in ("english", "union", *_arms())}
    blank = write_blank(root / "blank", (OLD, NEW))
    for seed in SEEDS:
        common: dict[str, Any] = {"seed": seed, "watch": (OLD, NEW)}
        english = ContinualPretraining(**HOW, steps=BEFORE, from_scratch=True)
        found["english"].append(extended(blank, root / f"english-{seed}", english, data=OLD, **common))
        for name, method in _arms().items():
            found[name].append(extended(root / f"english-{seed}", root / f"{name}-{seed}", method, data=NEW, **common))
        union = ContinualPretraining(**HOW, steps=BEFORE + AFTER, from_scratch=True, replay=OLD, replay_share=0.5)
        found["union"].append(extended(blank, root / f"union-{seed}", union, data=NEW, **common))
    results.record(
        _row(id=f"extend-cpt/{kind}-{name}", what=f"Loss on {told} text, {_told(name)}",
             values=tuple(getattr(_losses(run), kind) for run in of))
        for name, of in found.items() for kind, told in (("old", "old"), ("new", "new"))
    )  # fmt: skip
    return found


def _told(name: str) -> str:
    return {
        "english": "before",
        "union": "union from scratch",
        "constant": "a tenth of the rate, constant",
    }.get(name) or f"replay {float(name.removeprefix('replay-')):.0%}"


def _forgotten(runs: Mapping[str, list[Extended]], name: str) -> list[float]:
    pairs = zip(runs[name], runs["english"], strict=True)
    return [_losses(run).old - _losses(before).old for run, before in pairs]


def test_more_replay_forgets_less(runs):
    names = ["replay-0", *(f"replay-{share:g}" for share in SHARES)]
    results.record(
        _row(id=f"extend-cpt/forgotten-{name}", what=f"Rise of the loss on old text, {_told(name)}",
             values=tuple(_forgotten(runs, name))) for name in names
    )  # fmt: skip
    steps = [
        min(fewer - more for fewer, more in zip(_forgotten(runs, one), _forgotten(runs, other), strict=True))
        for one, other in pairwise(names)
    ]

    _check(
        id="extend-cpt/replay-orders-forgetting", values=tuple(steps), target=Target(">", 0), seeds=(),
        what="Rise of the old loss less that with more replay, 0 to 1%, 1 to 5%, 5 to 25%: smallest of the seeds",
    )  # fmt: skip


def test_a_quarter_replayed_is_as_good_as_training_on_both(runs):
    pairs = zip(runs["replay-0.25"], runs["union"], strict=True)

    _check(
        id="extend-cpt/quarter-to-union", target=Target("<=", 0.05),
        what="Mean loss of both texts with 25% replayed less that of the union from scratch",
        values=tuple(_losses(run).mean - _losses(union).mean for run, union in pairs),
    )  # fmt: skip


def test_without_rewarming_less_is_learnt(runs):
    pairs = zip(runs["constant"], runs["replay-0"], strict=True)

    _check(
        id="extend-cpt/rewarming-learns", target=Target(">", 0),
        what="Loss on new text at a tenth of the rate, constant, less that with re-warming",
        values=tuple(_losses(constant).new - _losses(warmed).new for constant, warmed in pairs),
    )  # fmt: skip


# Three parts of one text, one after the other.

PART_STEPS, ANNEAL_STEPS = 300, 60
PARTS = {**SETTINGS, "old": None, "new": f"three parts of {OLD}", "steps": (PART_STEPS, ANNEAL_STEPS)}


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Extended]]]:
    """By schedule and seed: a run for each part; the last of `infinite` is the annealed branch."""
    root = tmp_path_factory.mktemp("parts")
    blank, parts = write_blank(root / "blank", (OLD,)), _three_parts(root)
    how = {**HOW, "steps": PART_STEPS, "eval_every": 5}
    found: dict[str, list[list[Extended]]] = {"cosine": [], "infinite": []}
    for seed in SEEDS:
        for kind, chain in found.items():
            model, runs = blank, []
            for number, part in enumerate(parts):
                infinite: dict[str, Any] = {"schedule": "hold" if number else "infinite", "keep_state": True}
                chosen = {**(infinite if kind == "infinite" else {}), "from_scratch": not number}
                method = ContinualPretraining(**how, **chosen, go_on=kind == "infinite" and bool(number))
                out = root / f"{kind}-{seed}-{number}"
                runs.append(extended(model, out, method, data=str(part), watch=(OLD,), seed=seed))
                model = out
            chain.append(runs)
        annealed = ContinualPretraining(**{**how, "steps": ANNEAL_STEPS}, schedule="anneal", go_on=True)
        branch = extended(model, root / f"annealed-{seed}", annealed, data=str(parts[-1]), watch=(OLD,), seed=seed)
        found["infinite"][-1].append(branch)
    return found


def _three_parts(folder: Path) -> list[Path]:
    """The training documents of the old text in three files: none is held-out text of it."""
    from overhaul.corpora import open_corpus

    texts, files = [row["text"] for row in open_corpus(OLD).train], []
    for number in range(3):
        files.append(folder / f"part-{number}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number::3]))
    return files


def _bump(runs: list[Extended]) -> float:
    """The highest rise of the held-out loss over that at a part's beginning, of the second and the third part."""
    return max(max(first_points(run, OLD, len(run.points))) - run.before[OLD] for run in runs[1:3])


def test_the_rate_that_is_kept_has_no_bump_at_a_border(chains):
    bumps = {kind: tuple(_bump(runs) for runs in of) for kind, of in chains.items()}
    results.record(
        _row(id=f"extend-cpt/bump-{kind}", settings=PARTS, values=values,
             what=f"Highest rise of the held-out loss after a border between two parts, {kind}")
        for kind, values in bumps.items()
    )  # fmt: skip

    assert min(bumps["cosine"]) > 0  # else there is nothing to be below
    _check(
        id="extend-cpt/bump", unit="share", settings=PARTS, target=Target("<", 0.5),
        what="Rise after a border under the infinite schedule over that under a cosine for each part",
        values=tuple(max(ours, 0.0) / other for ours, other in zip(bumps["infinite"], bumps["cosine"], strict=True)),
    )  # fmt: skip


def test_annealed_it_is_as_good_as_the_cosine(chains):
    last = {kind: [runs[-1].after[OLD] for runs in of] for kind, of in chains.items()}
    results.record(
        _row(id=f"extend-cpt/parts-{kind}", settings=PARTS, values=tuple(values),
             what=f"Held-out loss after the last part, {told}")
        for kind, told, values in (
            ("cosine", "a cosine for each part", last["cosine"]),
            ("annealed", "infinite schedule, annealed", last["infinite"]),
            ("held", "infinite schedule, not annealed", [runs[2].after[OLD] for runs in chains["infinite"]]),
        )
    )  # fmt: skip

    _check(
        id="extend-cpt/annealed-over-cosine", unit="", settings=PARTS, target=Target("<=", 1.02),
        what="Held-out loss of the annealed branch over that of the last cosine",
        values=tuple(ours / other for ours, other in zip(last["infinite"], last["cosine"], strict=True)),
    )  # fmt: skip


# SmolLM2.

ENGLISH = "boolq-passages"
SMOL_SEEDS = (0, 1)
SMOL: dict[str, Any] = {"steps": 60, "batch_size": 2, "seq_len": 128, "lr": 3e-4, "save_every": 0}
SMOL_SETTINGS = {"model": "smollm2-135m", "old": ENGLISH, "new": NEW, **SMOL, "heldout": "32x128"}


@pytest.fixture(scope="module")
def german(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[Extended]]:
    """By share of English that is replayed."""
    root, found = tmp_path_factory.mktemp("german"), {}
    for share in (0.0, 0.25):
        replay = {"replay": ENGLISH, "replay_share": share} if share else {}
        method = ContinualPretraining(**SMOL, **replay)
        found[share] = [
            extended(smol, root / f"{share}-{seed}", method, data=NEW, seed=seed, watch=(ENGLISH, NEW), windows=32)
            for seed in SMOL_SEEDS
        ]
        results.record(
            _row(id=f"extend-cpt/smollm2-{kind}-{share:g}", settings=SMOL_SETTINGS, seeds=SMOL_SEEDS,
                 what=f"Change of SmolLM2's loss on {told}, replay {share:.0%}",
                 values=tuple(run.after[text] - run.before[text] for run in found[share]))
            for kind, told, text in (("english", "English", ENGLISH), ("german", "German", NEW))
        )  # fmt: skip
    return found


def test_smollm2_keeps_its_english(german):
    def rise(run: Extended) -> float:
        return run.after[ENGLISH] - run.before[ENGLISH]

    pairs = list(zip(german[0.25], german[0.0], strict=True))
    assert all(rise(without) > 0 for _, without in pairs)
    common: dict[str, Any] = {"settings": SMOL_SETTINGS, "seeds": SMOL_SEEDS}
    rows = (
        _row(id="extend-cpt/smollm2-english-kept", unit="share", **common, target=Target("<=", 0.5),
             what="Rise of the English loss with 25% replayed over that without",
             values=tuple(rise(with_) / rise(without) for with_, without in pairs)),
        _row(id="extend-cpt/smollm2-german-cost", **common, target=Target("<=", 0.1),
             what="German loss with 25% of English replayed less that without",
             values=tuple(with_.after[NEW] - without.after[NEW] for with_, without in pairs)),
    )  # fmt: skip
    results.record(rows)
    for row in rows:
        results.hold(row)


def _row(**fields: Any) -> Row:
    return Row(**{"kind": "claim", "unit": "nats", "seeds": SEEDS, "settings": SETTINGS, **fields})


def _check(**fields: Any) -> None:
    """Records a row, then holds it against its target."""
    results.hold(_row(**fields))
