"""Runs that go on from another: two are one, places and rates are taken up, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import overhaul, refused
from overhaul.artifact import CONTINUATION

HOW = ("--batch-size", "4", "--seq-len", "32", "--dtype", "fp32", "--lr", "1e-3", "--evaluate", "none",
       "--save-every", "0")  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    made = {}
    for word in ("new", "other", "old"):
        made[word] = folder / f"{word}.jsonl"
        rows = ({"text": f"{word} {number} is {number % 7}, {word} and more of it. " * 6} for number in range(300))
        made[word].write_text("\n".join(map(json.dumps, rows)))
    return made


def extended(parent: Path, out: Path, *words: object) -> Path:
    done = overhaul("extend", "cpt", parent, "-o", out, *HOW, *words)
    assert done.code == 0, done.err
    return out


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def rates(path: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (path / "metrics.jsonl").read_text().splitlines()]


RULES: dict[str, tuple[str, ...]] = {
    "adamw": (),
    "adamw8bit": ("--optimizer", "adamw8bit"),
    "document mask": ("--document-mask",),
    "fira": ("--optimizer", "fira", "--projection.rank", "8", "--projection.gap", "4"),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_two_runs_are_one(rule: tuple[str, ...], tiny: Path, texts: dict[str, Path], tmp_path: Path):
    """At a constant rate, to the bit: moments, the order of the new text, and the place in the old."""
    if "adamw8bit" in rule:
        pytest.importorskip("bitsandbytes")
    how = (*rule, "--data", texts["new"], "--replay", texts["old"], "--replay-share", "0.1", "--schedule", "constant")
    whole = extended(tiny, tmp_path / "whole", *how, "--steps", "8")
    first = extended(tiny, tmp_path / "first", *how, "--steps", "5", "--keep-state")
    second = extended(first, tmp_path / "second", *how, "--steps", "3", "--go-on")
    afresh = extended(first, tmp_path / "afresh", *how, "--steps", "3")

    one, two, other = (weights(path) for path in (whole, second, afresh))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_state_is_left_only_where_it_is_asked_for_and_not_handed_on_unseen(
    tiny: Path, texts: dict[str, Path], tmp_path: Path
):
    kept = extended(tiny, tmp_path / "kept", "--data", texts["new"], "--steps", "2", "--keep-state")
    not_kept = extended(kept, tmp_path / "not", "--data", texts["new"], "--steps", "2")
    assert overhaul("prune", "magnitude", kept, "-o", tmp_path / "pruned", "--evaluate", "none").code == 0

    there = [(path / CONTINUATION).exists() for path in (kept, not_kept, tmp_path / "pruned")]
    assert there == [True, False, False]


def test_old_text_goes_on_under_another_new_one(tiny: Path, texts: dict[str, Path], tmp_path: Path):
    """And the place in the first text is handed on through a run that does not read it."""
    how = ("--replay", texts["old"], "--replay-share", "0.5", "--steps", "4", "--keep-state")
    first = extended(tiny, tmp_path / "first", *how, "--data", texts["new"])
    done = overhaul("extend", "cpt", first, "-o", tmp_path / "second", *HOW, *how, "--data", texts["other"], "--go-on")
    assert "old.jsonl is read on from where it was left" in done.err
    assert "other.jsonl is read from its beginning" in done.err

    states = [torch.load(path / CONTINUATION, weights_only=True)["places"] for path in (first, tmp_path / "second")]
    texts_of = [{key for key in state if not key.startswith("mixture")} for state in states]
    assert texts_of[0] < texts_of[1]
    assert len(texts_of[1]) == 3
    assert (
        sum(states[0][key]["sources"] != states[1][key]["sources"] for key in texts_of[0]) == 1
    )  # the old, further on


def test_a_warm_up_begins_at_the_rate_that_was_left(tiny: Path, texts: dict[str, Path], tmp_path: Path):
    how = ("--data", texts["new"], "--steps", "10")
    first = extended(tiny, tmp_path / "first", *how, "--schedule", "rewarm-cosine", "--floor", "0.2", "--keep-state")
    on, afresh = (
        extended(first, tmp_path / name, *how, "--schedule", "rewarm", "--warmup", "0.5", *words)
        for name, words in (("on", ("--go-on",)), ("afresh", ()))
    )

    assert rates(on)[0] == pytest.approx(2e-4 + 0.1 * 8e-4)
    assert rates(afresh)[0] == pytest.approx(1e-4)
    assert rates(on)[5:] == rates(afresh)[5:] == [1e-3] * 5


def test_a_kept_rate_is_kept_whatever_hold_says_now(tiny: Path, texts: dict[str, Path], tmp_path: Path):
    how = ("--data", texts["new"], "--steps", "4", "--floor", "0.1")
    first = extended(tiny, tmp_path / "first", *how, "--schedule", "infinite", "--hold", "0.3", "--keep-state")
    held = extended(first, tmp_path / "held", *how, "--schedule", "hold", "--go-on", "--keep-state")
    annealed = extended(held, tmp_path / "annealed", *how, "--schedule", "anneal", "--go-on")

    assert rates(held) == pytest.approx([3e-4] * 4)
    assert 2e-4 < rates(annealed)[0] < 3e-4


def test_a_branch_leaves_what_it_began_with(tiny: Path, texts: dict[str, Path], tmp_path: Path):
    """What is annealed is another directory: the run goes on from the one before."""
    how = ("--data", texts["new"], "--steps", "4", "--hold", "0.5")
    first = extended(tiny, tmp_path / "first", *how, "--schedule", "infinite", "--keep-state")
    before = (first / CONTINUATION).read_bytes()
    annealed = extended(first, tmp_path / "annealed", *how, "--schedule", "anneal", "--go-on")
    second = extended(first, tmp_path / "second", *how, "--schedule", "hold", "--go-on", "--keep-state")

    assert (first / CONTINUATION).read_bytes() == before
    assert rates(annealed)[-1] < rates(annealed)[0] < 5e-4
    assert set(rates(second)) == {5e-4}


def test_what_cannot_be_gone_on_with(tiny: Path, texts: dict[str, Path], tmp_path: Path):
    first = extended(tiny, tmp_path / "first", "--data", texts["new"], "--steps", "2", "--keep-state")
    run = ("-o", tmp_path / "out", *HOW, "--data", texts["new"], "--steps", "2", "--go-on")

    refused(overhaul("extend", "cpt", tiny, *run), "has no continuation.pt", "--keep-state")
    refused(overhaul("extend", "cpt", first, *run, *RULES["fira"]), "cannot go on with", "--optimizer adamw")
    low = extended(tiny, tmp_path / "low", "--data", texts["new"], "--steps", "2", "--keep-state", *RULES["fira"])
    other = ("--optimizer", "fira", "--projection.rank", "16")
    refused(overhaul("extend", "cpt", low, *run, *other), "rank", "--projection.rank 8")
    refused(overhaul("extend", "cpt", first, *run, "--schedule", "anneal", "--floor", "0.5"), "below that which anneal")
    (first / CONTINUATION).write_bytes(b"nothing")
    refused(overhaul("extend", "cpt", first, *run), "cannot be read")
    changed = {name: tensor + 1 for name, tensor in weights(first).items()}
    save_file(changed, first / "model.safetensors", metadata={"format": "pt"})
    refused(overhaul("extend", "cpt", first, *run), "not those that continuation.pt was written with")
    assert not (tmp_path / "out").exists()
