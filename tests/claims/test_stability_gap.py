"""The stability gap (Guo et al., 2024) on small models: is it there, and do few good documents shrink it?

Llamas of four layers are trained on Wikipedia, then go on with Python's standard library, where every other document is
a German manual page: what is chosen is what reads like a small sample of code. All arms but the first have as many
tokens; the first reads on without choosing, for two and a half times the tokens, as the paper's baseline does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import results
from bench.results import Target

from claims.extending import SEQ_LEN, Extended, extended, write_blank
from overhaul import authenticity, ngram, stability
from overhaul.corpora import open_corpus
from overhaul.documents import Row
from overhaul.extend.cpt import ContinualPretraining
from overhaul.extend.stability_gap import StabilityGap
from overhaul.method import Training
from overhaul.report.facts import HELDOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

GENERAL, OTHER, DOMAIN = "boolq-passages", "manpages-de", "stdlib"
SEEDS = (0, 1, 2)
BEFORE, STEPS, FULL, EVERY = 500, 120, 300, 10
HOW: dict[str, Any] = {"batch_size": 8, "seq_len": SEQ_LEN, "lr": 1e-3, "save_every": 0}
SETTINGS = {
    "model": "llama 4 x 128, 1,024 tokens", "before": (GENERAL, BEFORE), "domain": f"{DOMAIN} with a half of {OTHER}",
    "steps": (STEPS, FULL), **HOW, "eval_every": EVERY, "heldout": f"64x{SEQ_LEN}",
}  # fmt: skip
MIX = 0.18


CHUNK, BEGINNING = 2000, 60


@dataclass(frozen=True, slots=True)
class Texts:
    """Code with as much of manual pages among it, a sample of code that is not in it, and how the pages begin."""

    blend: Path
    reference: Path
    pages: frozenset[str]

    def is_page(self, row: Row) -> bool:
        """Whether a document of the blend is one."""
        return str(row["text"])[:BEGINNING] in self.pages


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = tmp_path_factory.mktemp("texts")
    code, pages = ([str(row["text"]) for row in open_corpus(name).train] for name in (DOMAIN, OTHER))
    reference, code = code[::8], [text for number, text in enumerate(code) if number % 8]
    chunks = {kind: [text[at : at + CHUNK].strip() for text in of for at in range(0, min(len(text), 10 * CHUNK), CHUNK)]
              for kind, of in (("code", code), ("pages", pages))}  # fmt: skip
    half = min(map(len, chunks.values()))
    drawn = [text for of in chunks.values() for text in of[:half]]
    order = np.random.default_rng(0).permutation(len(drawn))
    begins = frozenset(text[:BEGINNING] for text in chunks["pages"])
    return Texts(
        _write(folder / "blend.jsonl", [drawn[place] for place in order]),
        _write(folder / "reference.jsonl", reference), begins,
    )  # fmt: skip


def _write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_the_reference_tells_the_domain_from_other_text(texts: Texts):
    model = ngram.fit((str(row["text"]) for row in open_corpus(texts.reference).train), order=5)
    rows = list(open_corpus(texts.blend).train)
    ranking = ngram.rank(rows, model)
    is_page_D = np.array([texts.is_page(row) for row in rows])
    pages, code = (ranking.perplexities_D[kind_D] for kind_D in (is_page_D, ~is_page_D))

    results.hold(
        _row(id="extend-stability-gap/selector", seeds=(0,), unit="", target=Target(">=", 0.9),
             values=(authenticity.auroc(pages, code),),
             what="Area under the curve by which n-gram perplexity tells code from German manual pages")
    )  # fmt: skip


def _arms(texts: Texts) -> dict[str, tuple[str, Training]]:
    """What is tried, with how it is told."""
    common = {**HOW, "eval_every": EVERY}
    few = {**common, "steps": STEPS}
    best: dict[str, Any] = {**few, "reference": str(texts.reference), "passes": 4}
    mixed = {**best, "mix": (f"{GENERAL}={MIX}",)}
    return {
        "full": ("all of it once, 2.5 times the tokens", ContinualPretraining(**common, steps=FULL)),
        "once": ("as many tokens, none twice", StabilityGap(**few, passes=1)),
        "random": ("any, four passes", StabilityGap(**few, passes=4)),
        "best": ("the best, four passes", StabilityGap(**best)),
        "fixed": ("the best, four passes, mixed", StabilityGap(**mixed)),
        "dynamic": ("the best, drawn four times, mixed", StabilityGap(**mixed, draw="dynamic")),
    }


@pytest.fixture(scope="module")
def runs(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Extended]]:
    root, arms = tmp_path_factory.mktemp("gap"), _arms(texts)
    blank = write_blank(root / "blank", (GENERAL, DOMAIN))
    found: dict[str, list[Extended]] = {name: [] for name in arms}
    for seed in SEEDS:
        general = ContinualPretraining(**HOW, steps=BEFORE, from_scratch=True)
        extended(blank, root / f"general-{seed}", general, data=GENERAL, watch=(GENERAL, DOMAIN), seed=seed)
        for name, (_, method) in arms.items():
            made = root / f"{name}-{seed}"
            found[name].append(
                extended(
                    root / f"general-{seed}", made, method, data=str(texts.blend), watch=(GENERAL, DOMAIN), seed=seed
                )
            )
    for name, (told, _) in arms.items():
        gaps = [_gap(run) for run in found[name]]
        results.record([
            _row(id=f"extend-stability-gap/depth-{name}", values=tuple(gap.depth for gap in gaps),
                 what=f"Depth of the gap in the general loss, {told}"),
            _row(id=f"extend-stability-gap/final-{name}", values=tuple(gap.final for gap in gaps),
                 what=f"Rise of the general loss at the end, {told}"),
            _row(id=f"extend-stability-gap/domain-{name}", values=tuple(run.after[DOMAIN] for run in found[name]),
                 what=f"Loss on code, {told}"),
        ])  # fmt: skip
    return found


def _gap(run: Extended) -> stability.Gap:
    key = f"{HELDOUT}/{GENERAL}"
    seen = [(point["tokens"], point[key]) for point in run.points if key in point]
    return stability.gap([(0, run.before[GENERAL]), *seen])


def test_there_is_a_gap(runs):
    gaps = [_gap(run) for run in runs["full"]]

    results.hold(
        _row(id="extend-stability-gap/seen", unit="share", target=Target(">", 0),
             what="Share of the gap's depth that came back by the end, all of the text once",
             values=tuple(1 - gap.final / gap.depth for gap in gaps))
    )  # fmt: skip


@pytest.mark.parametrize("name", ["fixed", "dynamic"])
def test_few_good_documents_in_the_mixture_make_it_shallower(runs, name: str):
    pairs = list(zip(runs[name], runs["full"], strict=True))
    row = _row(id=f"extend-stability-gap/shallower-{name}", unit="share", target=Target("<=", 0.6),
               what=f"Depth of the gap over that of all of the text once, the best with the mixture, {name}",
               values=tuple(_gap(run).depth / _gap(full).depth for run, full in pairs))  # fmt: skip
    learnt = _row(id=f"extend-stability-gap/learnt-{name}", target=Target("<=", 0.02),
                  what=f"Loss on code less that of all of the text once, the best with the mixture, {name}",
                  values=tuple(run.after[DOMAIN] - full.after[DOMAIN] for run, full in pairs))  # fmt: skip
    results.record([row, learnt])
    results.hold(row)
    results.hold(learnt)


def _row(**fields: Any) -> results.Row:
    return results.Row(**{"kind": "claim", "unit": "nats", "seeds": SEEDS, "settings": SETTINGS, **fields})
