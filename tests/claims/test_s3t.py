"""S3T on SmolLM2 (Basu Roy Chowdhury et al., ICLR 2025): exact to the bit, and what it is worth as deletions go on.

Worked problems of units and sums, three slices of ten blocks each. Utility is how far the loss on held-out answers lies
below that of the model before, as a share of what three sequences win before anything is deleted. SISA is one order of
the slices, with an adapter on all blocks that goes on learning at every slice and is kept at each: it is gone when its
first slice is hit. One sequence of S3T is the same with a third of the blocks for each slice.

Classes: which section of Debian a package is in, by the line that describes it, on MiniLM with two shards. Every stage
goes over its slices as often as the single stage goes over the shard that S3T is compared with. The same of images:
digits, on a vision transformer of four blocks with random weights that stay as they are.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import results
from bench.results import Row, Target

from command import overhaul
from overhaul import artifact, evaluate
from overhaul.artifact import Artifact
from overhaul.corpora import CorpusSpec, open_whole
from overhaul.data import Data
from overhaul.deletion.book import Book
from overhaul.deletion.ensemble import Ensemble
from overhaul.deletion.sequences import Order
from overhaul.deletion.survivors import Survivors
from overhaul.documents import json_line, read_rows
from overhaul.interop.classifier import channels_of, classes_of
from overhaul.interop.pixels import sized
from overhaul.kinds import Kind
from overhaul.labelled_texts import LabelledTexts, read_labelled
from overhaul.picture_rows import open_pictures
from overhaul.task_data import Batched, Examples, encoded
from overhaul.task_scores import logits_of
from overhaul.unlearning.slices import cell_of
from services import stages_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

SEEDS = (0, 1, 2)
SLICES = 3
SIZE = ("--shards", 1, "--slices", SLICES, "--budget", 3, "--batch-size", 8, "--seq-len", 64, "--lr", 1e-3,
        "--evaluate", "none", "--save-every", 0)  # fmt: skip
SHORT = ("--steps", 3, "--rank", 4)
LONG = ("--steps", 30, "--rank", 8)
ORDERS, REQUESTS = 200, 12
"""Random orders of requests that utility is averaged over, and requests of each."""
SETTINGS = {
    "model": "smollm2-135m",
    "data": "data questions --kinds units arithmetic",
    "flags": " ".join(map(str, SIZE)),
}


def _written(root: Path, seed: int, examples: int) -> Path:
    file = root / f"asked-{seed}.jsonl"
    how = ("--kinds", "units", "arithmetic", "--count", examples, "--heldout", 40, "--seed", seed)
    done = overhaul("data", "questions", "-o", file, *how)
    assert done.code == 0, done.err
    return file


def _service(out: Path, data: Path, seed: int, *how: object) -> Path:
    done = overhaul("forget", "s3t", "smollm2-135m", "-o", out, "--data", data, "--seed", seed, *SIZE, *how)
    assert done.code == 0, done.err
    return out


def test_what_is_left_is_what_is_trained_without_the_example(tmp_path: Path):
    """Bit for bit, every tensor of every stage, with the other examples in another order."""
    same, others = [], []
    for seed in SEEDS:
        data = _written(tmp_path, seed, 120)
        lines = data.read_text().splitlines()
        gone, rest = tmp_path / f"gone-{seed}.jsonl", tmp_path / f"rest-{seed}.jsonl"
        gone.write_text(lines[7] + "\n")
        rest.write_text("".join(f"{line}\n" for line in reversed(lines) if line != lines[7]))
        whole = _service(tmp_path / f"whole-{seed}", data, seed, *SHORT)
        without = _service(tmp_path / f"without-{seed}", rest, seed, *SHORT)
        with Book(whole) as book:
            before = len(book.stages())
        done = overhaul("forget", "delete", whole, "--text", gone)
        assert done.code == 0, done.err
        left, wanted = stages_of(whole), stages_of(without)
        cell = cell_of(next(iter(read_rows(gone).rows)).id, 1, SLICES, seed)
        assert 0 < len(left) < before
        assert all(cell[1] not in order for _, order in left)
        same.append(statistics.fmean(same(left[key], wanted[key]) for key in left))
        others.append(len(left) / before)
    results.hold(*[
        _row("exact", "Stages left by a deletion that equal those trained without the example, to the bit", same,
             Target("==", 1.0), "share"),
        _row("left", "Stages left by a deletion, of all before it", others, unit="share"),
    ])  # fmt: skip


def test_three_sequences_are_worth_more_than_one_as_deletions_go_on(tmp_path: Path):
    areas: dict[str, list[float]] = {"three": [], "one": [], "sisa": []}
    begins, plain, lasts = [], [], {"three": [], "one": []}
    for seed in SEEDS:
        data = _written(tmp_path, seed, 240)
        heldout = data.with_name(f"{data.stem}.heldout.jsonl")
        service = _service(tmp_path / f"service-{seed}", data, seed, *LONG)
        loss = _losses(service, heldout)
        with Book(service) as book:
            orders = book.orders[0]
        bare, full = loss(()), loss(orders[0])
        sisa = _sisa(tmp_path / f"sisa-{seed}", data, heldout, seed)
        for name, chosen, at in (("three", orders, loss), ("one", orders[:1], loss), ("sisa", [SISA_ORDER], sisa)):
            curves = [
                [(bare - at(left)) / (bare - full) for left in _served(chosen, dice)]
                for dice in map(random.Random, range(ORDERS))
            ]
            areas[name].append(statistics.fmean(map(statistics.fmean, curves)))
        for name, left in lasts.items():
            chosen = orders[: 3 if name == "three" else 1]
            left.append(statistics.fmean(_until_gone(chosen, random.Random(order)) for order in range(ORDERS)))
        begins.append(bare - full)
        plain.append((bare - full) / (bare - _lora(tmp_path / f"lora-{seed}", data, heldout, seed)))
    results.hold(*[
        _row("wins", "Fall of the loss on held-out answers, three stages, nothing deleted", begins, Target(">", 0),
             "nats"),
        _row("of-lora", "Fall of the loss, of that of one LoRA on all of the data in as many steps", plain,
             unit="share"),
        _row("area-one", f"Utility over {REQUESTS} random requests, one sequence", areas["one"], unit="share"),
        _row("area-sisa", f"Utility over {REQUESTS} random requests, SISA with an adapter on all blocks", areas["sisa"],
             unit="share"),
        _row("area-three", f"Utility over {REQUESTS} random requests, three sequences", areas["three"], unit="share"),
        _row("area", f"Utility over {REQUESTS} random requests, three sequences above one",
             [a - b for a, b in zip(areas["three"], areas["one"], strict=True)],
             Target(">", 0), "share"),
        _row("area-above-sisa", f"Utility over {REQUESTS} random requests, three sequences above SISA",
             [a - b for a, b in zip(areas["three"], areas["sisa"], strict=True)],
             Target(">", 0), "share"),
        _row("lasts-one", "Requests until nothing is left, one sequence (formula: 3)", lasts["one"]),
        _row("lasts-three", "Requests until nothing is left, three sequences (formula: 5.5)", lasts["three"]),
    ])  # fmt: skip


def _served(orders: Sequence[Order], dice: random.Random) -> list[Order]:
    """What answers before the first request and after each, requests hitting every slice alike."""
    left = Survivors((orders,))
    found = [left.serving(0)]
    for _ in range(REQUESTS):
        left.delete(0, dice.randrange(SLICES))
        found.append(left.serving(0))
    return found


def _until_gone(orders: Sequence[Order], dice: random.Random) -> int:
    left = Survivors((orders,))
    for number in count(1):
        left.delete(0, dice.randrange(SLICES))
        if left.is_gone:
            return number
    raise AssertionError


def _losses(service: Path, heldout: Path) -> Callable[[Order], float]:
    """`loss(order)`: on held-out answers, in nats a token, with the stages of a beginning alone."""
    made, stages = artifact.load(service), stages_of(service)
    with Book(service) as book:
        ensemble = Ensemble.of(made.model, book.settings)

    @cache
    def of(order: Order) -> float:
        lengths = range(1, len(order) + 1)
        ensemble.take({0: {name: t for length in lengths for name, t in stages[0, order[:length]].items()}})
        return _loss(made.model, made.processor, heldout)

    return of


def _loss(model: Any, processor: Any, heldout: Path) -> float:
    data = Data(open_whole(CorpusSpec(path=str(heldout))), processor)
    return float(evaluate.document_nll(model, data.encoded(list(data.corpus.train))).mean())


LORA = ("--rank", 8, "--batch-size", 8, "--seq-len", 64, "--lr", 1e-3, "--whole", "--evaluate", "none", "--save-every",
        0)  # fmt: skip
SISA_ORDER: Order = tuple(range(SLICES))


def _lora(out: Path, data: Path, heldout: Path, seed: int) -> float:
    """The loss of an adapter on all blocks, with the steps of three stages."""
    done = overhaul("adapt", "lora", "smollm2-135m", "-o", out, "--data", data, "--seed", seed, *LORA, "--steps", 90)
    assert done.code == 0, done.err
    made = artifact.load(out)
    return _loss(made.model, made.processor, heldout)


def _sisa(root: Path, data: Path, heldout: Path, seed: int) -> Callable[[Order], float]:
    """`loss(order)` of what is kept behind each slice, trained on all slices up to it in as many steps as a stage."""
    root.mkdir()
    lines = data.read_text().splitlines()
    cells = [cell_of(row.id, 1, SLICES, seed)[1] for row in read_rows(data).rows]
    kept: dict[Order, str] = {(): "smollm2-135m"}
    for length in range(1, SLICES + 1):
        order, part = SISA_ORDER[:length], root / f"{length}.jsonl"
        part.write_text("".join(f"{line}\n" for line, cell in zip(lines, cells, strict=True) if cell in order))
        out, begins = root / f"{length}", kept[order[:-1]]
        done = overhaul("adapt", "lora", begins, "-o", out, "--data", part, "--seed", seed, *LORA, "--steps", 30)
        assert done.code == 0, done.err
        kept[order] = str(out)

    @cache
    def of(order: Order) -> float:
        made = artifact.load(kept[order])
        return _loss(made.model, made.processor, heldout)

    return of


def _row(
    name: str, what: str, values: Sequence[float], target: Target | None = None, unit: str = "",
    settings: Mapping[str, Any] = SETTINGS,
) -> Row:  # fmt: skip
    return Row(
        id=f"forget-s3t/{name}", kind="claim", what=what, values=tuple(values), unit=unit, target=target,
        seeds=SEEDS if settings is SETTINGS else CLASS_SEEDS, settings=settings,
    )  # fmt: skip


CLASS_SEEDS = (0, 1, 2)
SECTIONS, TRAINED_ON, MEASURED = 20, 40, 100
"""Classes, and descriptions of each."""
SHARDS, WIDTH, POINTS = 2, 24, 0.03
DIGIT_SLICES = 2
OF_DIGITS = ("--shards", SHARDS, "--epochs", 8, "--batch-size", 16, "--lr", 1e-3, "--save-every", 0)
Accuracy = Callable[[Sequence[Order]], float]
Orders = Sequence[Sequence[Order]]
HOW = ("--shards", SHARDS, "--label-field", "section", "--epochs", 4, "--batch-size", 16, "--seq-len", WIDTH, "--lr",
       2e-3, "--save-every", 0)  # fmt: skip
OF_CLASSES = {
    "model": "all-minilm-l6-v2",
    "data": f"descriptions of Debian's packages, {SECTIONS} sections, {TRAINED_ON} of each",
    "flags": " ".join(map(str, HOW)),
}


def test_classes_are_told_as_by_one_stage_and_longer_than_by_one_sequence(tmp_path: Path):
    """Accuracy among 20 classes; where nothing is left it is that of guessing."""

    def measured(seed: int, size: Callable[[int], tuple[object, ...]]) -> tuple[Accuracy, Accuracy, Orders]:
        train, held, names = _packages(tmp_path / f"packages-{seed}", seed)
        sliced, single = (
            _classifier(tmp_path / f"{n}-{seed}", OF_CLASSES["model"], train, seed, *HOW, *size(n), "--classes", *names)
            for n in (SLICES, 1)
        )
        return _accuracies(sliced, _texts(held)), _accuracies(single, _texts(held)), _orders(sliced)

    _hold_classes("classes", f"Accuracy among {SECTIONS} classes", measured, SLICES, OF_CLASSES)


def test_digits_are_told_as_by_one_stage_and_longer_than_by_one_sequence(tmp_path: Path):
    """As of texts; pictures are sliced by their pixels."""
    done = overhaul("blank", "vit", "-o", tmp_path / "vit", "--images", "digits")
    assert done.code == 0, done.err

    def measured(seed: int, size: Callable[[int], tuple[object, ...]]) -> tuple[Accuracy, Accuracy, Orders]:
        sliced, single = (
            _classifier(tmp_path / f"{n}-{seed}", tmp_path / "vit", "digits", seed, *OF_DIGITS, *size(n))
            for n in (DIGIT_SLICES, 1)
        )
        return _accuracies(sliced, _digits), _accuracies(single, _digits), _orders(sliced)

    settings = {"model": "blank vit --images digits", "data": "digits", "flags": " ".join(map(str, OF_DIGITS))}
    _hold_classes("digits", "Accuracy on digits, a ViT of four blocks", measured, DIGIT_SLICES, settings)


def _hold_classes(
    name: str, what: str, measured: Callable[..., tuple[Accuracy, Accuracy, Orders]], slices: int,
    settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Of a set of classes: how far several stages are from one, and several sequences above one as deletions go on."""
    stages: dict[str, list[float]] = {"several": [], "one": []}
    areas: dict[str, list[float]] = {"several": [], "one": []}
    for seed in CLASS_SEEDS:
        sliced, single, orders = measured(seed, lambda n: ("--slices", n, "--budget", n))
        stages["several"].append(sliced([shard[0] for shard in orders]))
        stages["one"].append(single([(0,)] * SHARDS))
        for called, budget in (("several", slices), ("one", 1)):
            chosen = [shard[:budget] for shard in orders]
            curves = [_curve(sliced, chosen, slices, random.Random(n)) for n in range(ORDERS)]
            areas[called].append(statistics.fmean(map(statistics.fmean, curves)))
    gaps = [one - several for one, several in zip(stages["one"], stages["several"], strict=True)]
    above = [several - one for several, one in zip(areas["several"], areas["one"], strict=True)]
    word, after = {2: "two", 3: "three"}[slices], f"over {REQUESTS} random requests, {SHARDS} shards of {slices} slices"
    results.hold(*[
        _row(name, f"{what}, {word} stages", stages["several"], None, "share", settings),
        _row(f"{name}-one-stage", f"{what}, one stage on the whole shard", stages["one"], None, "share", settings),
        _row(f"{name}-gap", f"{what}, one stage above {word}", gaps, Target("<", POINTS), "share", settings),
        _row(f"{name}-area-one", f"{what} {after}, one sequence", areas["one"], None, "share", settings),
        _row(f"{name}-area-{word}", f"{what} {after}, {word} sequences", areas["several"], None, "share", settings),
        _row(f"{name}-area", f"{what} {after}, {word} sequences above one", above, Target(">", 0), "share", settings),
    ])  # fmt: skip


def _packages(root: Path, seed: int) -> tuple[Path, Path, list[str]]:
    """Two tables of descriptions with their sections, and the largest sections; a seed draws other packages."""
    if not shutil.which("apt-cache"):
        pytest.skip("Debian's list of packages is not here")
    told = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    for package in told.split("\n\n"):
        columns = dict(line.split(": ", 1) for line in package.splitlines() if ": " in line and line[0] != " ")
        if {"Section", "Description"} <= columns.keys():
            found.setdefault(columns["Section"], set()).add(columns["Description"])
    names = sorted(found, key=lambda name: (-len(found[name]), name))[:SECTIONS]
    root.mkdir()
    train, held = root / "train.jsonl", root / "held.jsonl"
    drawn = {
        name: sorted(found[name], key=lambda text: hashlib.sha256(f"{seed}{text}".encode()).digest()) for name in names
    }
    for file, chosen in ((train, slice(0, TRAINED_ON)), (held, slice(TRAINED_ON, TRAINED_ON + MEASURED))):
        rows = ({"text": text, "section": name} for name, texts in drawn.items() for text in texts[chosen])
        file.write_text("".join(map(json_line, rows)))
    return train, held, names


def _classifier(out: Path, model: str | Path, data: str | Path, seed: int, *how: object) -> Path:
    done = overhaul("forget", "s3t", model, "-o", out, "--data", data, *how, "--seed", seed)
    assert done.code == 0, done.err
    return out


def _orders(service: Path) -> Orders:
    with Book(service) as book:
        return book.orders


def _texts(held: Path) -> Callable[[Artifact], Batched]:
    def read(made: Artifact) -> Batched:
        known, pairs = classes_of(made.model), read_labelled(str(held), label="section")[0]
        labels_N = np.array([known.index(label) for _, label in pairs], np.int64)
        return encoded(LabelledTexts(texts=tuple(text for text, _ in pairs), labels_N=labels_N), made.processor, WIDTH)

    return read


def _digits(made: Artifact) -> Batched:
    known, rows = classes_of(made.model), open_pictures("digits").heldout
    images_NHWC = np.stack([row.pixels_HWC for row in rows])
    labels_N = np.array([known.index(row.label) for row in rows], np.int64)
    return Examples(sized(images_NHWC, made.processor, channels_of(made.model)), labels_N, made.processor)


def _accuracies(service: Path, examples_of: Callable[[Artifact], Batched]) -> Accuracy:
    """`accuracy(orders)`: with a beginning for each shard, of which some may be empty; guessing where all are."""
    made = artifact.load(service, kinds=(Kind.TEXT_CLASSIFIER, Kind.IMAGE_CLASSIFIER))
    stages, examples = stages_of(service), examples_of(made)
    with Book(service) as book:
        ensemble = Ensemble.of(made.model, book.settings)

    @cache
    def logits(shard: int, order: Order) -> torch.Tensor:
        parts = (stages[shard, order[:length]].items() for length in range(1, len(order) + 1))
        ensemble.take({shard: {name: tensor for part in parts for name, tensor in part}})
        return logits_of(made.model, examples, dtype=torch.float32)

    def of(orders: Sequence[Order]) -> float:
        own = [logits(shard, order) for shard, order in enumerate(orders) if order]
        if not own:
            return 1 / len(classes_of(made.model))
        return float((torch.stack(own).mean(dim=0).argmax(dim=1).numpy() == examples.labels_N).mean())

    return of


def _curve(accuracy: Accuracy, orders: Sequence[Sequence[Order]], slices: int, dice: random.Random) -> list[float]:
    """Accuracy before the first request and after each, requests hitting every slice of every shard alike."""
    left = Survivors(orders)
    found = [accuracy([left.serving(shard) for shard in range(SHARDS)])]
    for _ in range(REQUESTS):
        left.delete(dice.randrange(SHARDS), dice.randrange(slices))
        found.append(accuracy([left.serving(shard) for shard in range(SHARDS)]))
    return found
