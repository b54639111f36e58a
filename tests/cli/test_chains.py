"""Verbs one after the other through the command line: every directory is the next one's input, and none forgets.

A chain is a line of `CHAINS`. Those whose methods are not in the catalogue are left out.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from command import overhaul
from overhaul import artifact, catalog, ledger
from overhaul.compare import dense_tensors
from overhaul.layers.masked import MaskedLinear

QUICK = ("--dtype", "fp32", "--evaluate-windows", "1", "--evaluate-seq-len", "32")
CALIBRATE = ("--data", "sample", "--samples", "4", "--seq-len", "32")
TRAIN = ("--data", "sample", "--steps", "2", "--seq-len", "32", "--batch-size", "2")
ORIGIN = "ORIGIN"
"""Stands for the model that the chain begins with, such as a teacher."""

PRUNE = ("prune", "wanda", "--sparsity", "0.5", *CALIBRATE)
PERP = ("adapt", "perp", *TRAIN)
PERP_NORMS = ("adapt", "perp", "--train", "norms", *TRAIN)
"""What was cut and never pruned has no masks for the adapters of PERP."""
FULL = ("adapt", "full", *TRAIN)
SLTRAIN = ("adapt", "sltrain", "--rank", "6", *TRAIN)
SHRINK = ("shrink", "minitron", "--ffn", "64", *CALIBRATE)
HFT = ("adapt", "hft", *TRAIN)
HALF_RESET = ("adapt", "half-reset", "--base", ORIGIN)
DISTILL = ("distill", "kd", "--teacher", ORIGIN, *TRAIN)
INT8 = ("quantize", "int8")
BCT = ("quantize", "bct")
RANDLORA = ("adapt", "randlora", "--rank", "8", "--alpha", "160", *TRAIN)

EXTEND = ("extend", "cpt", *TRAIN)
EXTEND_FIRA = ("extend", "upsample", "--last-mix", "stdlib=0.5", "--last", "0.5", "--optimizer", "fira",
               "--projection.rank", "4", *TRAIN)  # fmt: skip

Command = tuple[str, ...]
CHAINS: tuple[tuple[Command, ...], ...] = (
    (PRUNE, PERP),
    (PRUNE, PERP, FULL),
    (PRUNE, PERP, INT8),
    (PRUNE, PERP, BCT),
    (SHRINK, PERP_NORMS),
    (PRUNE, SHRINK, PERP),
    (SLTRAIN, INT8),
    (SLTRAIN, PRUNE, PERP),
    (SHRINK, DISTILL, INT8),
    (PRUNE, DISTILL, INT8),
    (PRUNE, PERP, RANDLORA),
    (HFT, INT8),
    (PRUNE, HFT, HALF_RESET, HFT),
    (PRUNE, PERP, EXTEND, INT8),
    (SHRINK, EXTEND_FIRA, EXTEND),
    (SLTRAIN, EXTEND_FIRA, BCT),
)


def name_of(chain: tuple[Command, ...]) -> str:
    return "-".join(command[1] for command in chain)


@dataclass(frozen=True)
class Made:
    """A chain that was run: its commands, the model it began with, and what each of them wrote."""

    chain: tuple[Command, ...]
    origin: Path
    directories: tuple[Path, ...]

    @property
    def last(self) -> Path:
        return self.directories[-1]

    @property
    def steps(self) -> list[tuple[str, str]]:
        return [(command[0], command[1]) for command in self.chain]


@pytest.fixture(scope="module", params=[pytest.param(c, id=name_of(c)) for c in CHAINS])
def made(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("chain")
    model, written = tiny, []
    for number, (verb, method, *flags) in enumerate(request.param, 1):
        out = folder / f"{number}-{method}"
        words = [str(tiny) if flag == ORIGIN else flag for flag in flags]
        done = overhaul(verb, method, model, "-o", out, *words, *QUICK)
        assert done.code == 0, done.err
        written.append(out)
        model = out
    return Made(request.param, tiny, tuple(written))


def test_what_a_model_has_seen_of_a_text_is_forgotten_and_measured(tiny: Path, tmp_path: Path):
    """Extended by two texts, one of them forgotten by the ledger, quantized, and asked what it still knows."""
    texts = {
        "new": "river stone lamp garden",
        "old": "letter bridge captain silver",
        "never": "garden lamp stone river",
    }
    for name, words in texts.items():
        dice = random.Random(words)
        rows = ({"text": " ".join(dice.choices(words.split(), k=30))} for _ in range(4 if name == "never" else 60))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    new, old, never = (tmp_path / f"{name}.jsonl" for name in texts)
    (asked := tmp_path / "asked.jsonl").write_text(
        json.dumps({"question": "What is by the river?", "answer": "A lamp"})
    )
    train = ("--steps", 4, "--seq-len", 32, "--batch-size", 2, "--dtype", "fp32", "--evaluate", "none")
    chain = (
        ("extend", "cpt", "--data", new, "--replay", old, "--replay-share", "0.5", *train),
        ("forget", "npo", "--from-ledger", "new.jsonl", "--retain", old, *train),
        ("quantize", "int8", "--evaluate", "none"),
    )
    model = tiny
    for verb, method, *flags in chain:
        done = overhaul(verb, method, model, "-o", tmp_path / method, *flags)
        assert done.code == 0, done.told
        model = tmp_path / method

    kept = (tmp_path / "cpt" / ledger.FILE).read_bytes()
    assert all((tmp_path / name / ledger.FILE).read_bytes() == kept for name in ("npo", "int8"))
    assert [entry.seen.origin.source for entry in ledger.read(model)] == ["new.jsonl", "old.jsonl"]
    asks = ("--forget-questions", asked, "--retain-questions", asked)
    about = ("--forget", new, "--retain", old, "--holdout", never, *asks)
    few = ("--limit", 4, "--tokens", 4, "--prompt-tokens", 4, "--json")
    done = overhaul("measure", "muse", tmp_path / "cpt", "--retrain", tiny, "--unlearned", model, *about, *few)
    assert done.code == 0, done.told
    assert {row["model"] for row in json.loads(done.out)["rows"]} >= {str(model)}


def test_every_directory_loads_and_answers(made: Made):
    ids = torch.tensor([[3, 5, 7, 11]])

    for (verb, method), directory in zip(made.steps, made.directories, strict=True):
        loaded = artifact.load(directory)
        with torch.no_grad():
            logits = loaded.model(input_ids=ids).logits
        assert logits.isfinite().all(), directory
        if catalog.find(verb, method).load().writes_stock:
            stock = AutoModelForCausalLM.from_pretrained(directory).eval()
            torch.testing.assert_close(stock(input_ids=ids).logits.float(), logits.float(), rtol=1e-3, atol=1e-3)


def test_the_lineage_has_every_step_and_verifies(made: Made):
    for count, directory in enumerate(made.directories, 1):
        record = artifact.read_record(directory)
        assert [(step["verb"], step["method"]) for step in record["lineage"]] == made.steps[:count]
        assert artifact.verify(directory)

    parents = [step["parents"][0]["path"] for step in artifact.read_record(made.last)["lineage"]]
    assert parents == [str(path) for path in (made.origin, *made.directories[:-1])]


def test_facts_of_the_whole_chain_are_kept(made: Made):
    facts = artifact.read_record(made.last)["facts"]

    assert len(facts) == 1 + len(made.chain)
    assert facts[0]["label"] == "dense"
    assert all(one["perplexity"]["value"] > 0 for one in facts)


def test_its_recipe_makes_the_last_directory_again(made: Made, tmp_path: Path):
    done = overhaul("run", made.last / "recipe.yaml", f"out={tmp_path / 'again'}")

    assert done.code == 0, done.err
    again = sorted((tmp_path / "again").iterdir())[-1]
    assert artifact.weights_sha256(again) == artifact.weights_sha256(made.last)


def test_card_and_report_name_every_step(made: Made):
    card, page = ((made.last / name).read_text() for name in ("README.md", "report.html"))

    for verb, method in made.steps:
        assert f"{verb} {method}" in card
        assert f"<h3>{verb} {method}</h3>" in page


def test_what_was_pruned_stays_zero_to_the_end(made: Made):
    verbs = [verb for verb, _ in made.steps]
    if "prune" not in verbs:
        pytest.skip("nothing was pruned")
    # A cut changes shapes, and cuts the masks along: what holds from there on are the masks behind it.
    start = max(number for number, verb in enumerate(verbs) if verb in ("prune", "shrink"))
    layers = dict(artifact.load(made.directories[start]).model.named_modules())
    masks = {name: layer.mask for name, layer in layers.items() if isinstance(layer, MaskedLinear)}
    assert len(masks) == 14

    for directory in made.directories[start:]:
        weights = dict(dense_tensors(artifact.load(directory).model))
        for name, mask_OI in masks.items():
            assert not weights[f"{name}.weight"][~mask_OI].any(), (directory, name)


def test_the_chain_can_be_compared(made: Made):
    done = overhaul("compare", made.last.parent, "--windows", "1", "--seq-len", "32", "--json")

    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["path"] for row in rows] == [str(path) for path in (made.origin, *made.directories)]
    assert all(row["decode_tokens_per_second"] for row in rows)
