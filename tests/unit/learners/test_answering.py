"""A language model that learns classes of texts: identities between methods, padding, directories, chains, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from command import interrupted, overhaul, refused
from overhaul import artifact, task_record
from overhaul.continual import FeaturesKept, OldModel, OldSigmoids, Replayed
from overhaul.fisher import diagonal
from overhaul.interop.classifier import PENULTIMATE, can_pad, classes_of, classified, set_classes, with_head
from overhaul.kinds import Kind, kind_of_model
from overhaul.objective import Forward
from overhaul.reservoir import Reservoir

FLAGS = ("--label-field", "label", "--seq-len", "16", "--batch-size", "8", "--dtype", "fp32", "--optimizer", "adamw",
         "--lr", "0.003", "--steps", "12", "--heldout", "6")  # fmt: skip
WORDS = {"cat": "purr meow whisker paw", "dog": "bark fetch leash tail", "ship": "sail anchor deck mast",
         "tree": "leaf root moss branch"}  # fmt: skip


def write_topics(path: Path, classes: tuple[str, ...] = tuple(WORDS), seed: int = 0) -> Path:
    """Thirty texts of each class, of 2 to 6 words of it."""
    dice = np.random.default_rng(seed)
    rows = [
        {"text": " ".join([*dice.choice(WORDS[name].split(), dice.integers(2, 7)), str(number)]), "label": name}
        for name in classes
        for number in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_topics(tmp_path_factory.mktemp("topics") / "topics.jsonl")


def learnt(name: str, model: Path, topics: Path, out: Path, *flags: object) -> dict[str, Tensor]:
    done = overhaul("learn", name, model, "-o", out, "--tasks", topics, "--split", "2", *FLAGS, *flags)
    assert done.code == 0, done.err
    return load_file(out / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.fixture
def model(tiny: Path) -> Any:
    """A classifier of three classes under the tiny model."""
    made = artifact.load(tiny)
    found: Any = with_head(made.model)
    can_pad(found, made.processor)
    torch.manual_seed(0)
    set_classes(found, ("a", "b", "c"))
    return found.eval()


def padded(rows: list[list[int]], pad: int, width: int) -> dict[str, Tensor]:
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(rows)) % 3}


ROWS = [[5, 9, 30, 7], [8, 8], [40, 3, 22, 11, 19, 6, 2], [17]]


@pytest.fixture
def batch(model: Any) -> dict[str, Tensor]:
    return padded(ROWS, model.config.pad_token_id, 9)


# The model.


def test_a_head_is_put_on_the_very_body_and_has_no_class_yet(tiny: Path):
    made = artifact.load(tiny)
    found: Any = with_head(made.model)

    assert kind_of_model(found) is Kind.TEXT_CLASSIFIER
    assert classes_of(found) == ()
    whole: Any = made.model
    assert found.base_model is whole.base_model
    assert whole.config.num_labels == 2, "the model itself is as it was"


def test_padding_changes_nothing(model: Any, batch: dict[str, Tensor]):
    layers = ("model.layers.0", PENULTIMATE)
    model.requires_grad_(True)
    together = classified(model, batch, layers)
    gradient = torch.autograd.grad(together.logits.square().sum(), model.model.layers[0].mlp.up_proj.weight)[0]
    alone = [classified(model, padded([row], model.config.pad_token_id, len(row)), layers) for row in ROWS]
    apart = torch.cat([one.logits for one in alone])
    wanted = torch.autograd.grad(apart.square().sum(), model.model.layers[0].mlp.up_proj.weight)[0]

    torch.testing.assert_close(together.logits, apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)
    for name in layers:
        expected = torch.cat([one.features[name] for one in alone])
        assert expected.shape == (len(ROWS), 64)
        torch.testing.assert_close(together.features[name], expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_what_it_was_feels_no_pull_of_predictions_or_features(model: Any, batch: dict[str, Tensor]):
    old = copy.deepcopy(model).requires_grad_(False)
    model.requires_grad_(True)
    for term in (OldSigmoids(old, 2), OldModel(old, 2), FeaturesKept(old, PENULTIMATE)):
        forward = Forward(model, batch)
        forward.keep_features(term.reads_features)
        total = term.total(forward, batch)
        gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        assert abs(float(total.detach())) < 1e-4
        assert all(g is None or float(g.abs().max()) < 1e-5 for g in gradients)
        with torch.no_grad():
            other = copy.deepcopy(model)
            other.score.weight.add_(torch.randn_like(other.score.weight))
            other.model.layers[0].mlp.up_proj.weight.add_(0.3)
        moved = Forward(other, batch)
        moved.keep_features(term.reads_features)
        assert float(term.total(moved, batch).detach()) > 1e-3


def test_remembered_texts_are_those_that_were_seen(model: Any, batch: dict[str, Tensor]):
    memory = Reservoir(8, seed=0)
    memory.insert(batch)
    drawn = memory.draw(4)
    whole = {**batch, **{f"memory/{name}": tensor for name, tensor in drawn.items()}}

    found = Replayed().total(Forward(model, whole), whole)

    order = [batch["input_ids"].tolist().index(row) for row in drawn["input_ids"].tolist()]
    logits = classified(model, batch).logits[order]
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][order], reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("labels", ["exact", "empirical", "weighted"])
def test_information_of_texts_is_that_of_single_ones(model: Any, batch: dict[str, Tensor], labels: Any):
    model.requires_grad_(True)
    found = diagonal(model, [batch], labels=labels)
    weight = model.model.layers[1].self_attn.q_proj.weight
    expected = torch.zeros_like(weight)
    for number, row in enumerate(ROWS):
        log_C = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        given = int(batch["labels"][number])
        of = {"exact": {c: float(log_C[c].detach().exp()) for c in range(3)}, "empirical": {given: 1.0},
              "weighted": {given: float(log_C[given].detach().exp())}}[labels]  # fmt: skip
        for label, share in of.items():
            gradient = torch.autograd.grad(log_C[label], weight, retain_graph=True)[0]
            expected += share * gradient.square() / len(ROWS)

    torch.testing.assert_close(found["model.layers.1.self_attn.q_proj.weight"], expected, rtol=1e-3, atol=1e-9)


# Methods.


def test_with_a_softmax_and_nothing_held_rehearsal_free_is_plain_training(tiny: Path, topics: Path, tmp_path: Path):
    free = learnt("rehearsal-free", tiny, topics, tmp_path / "a", "--head", "softmax", "--predictions", "0")

    assert same(free, learnt("bregman", tiny, topics, tmp_path / "b", "--output-term", "none"))


def test_ewc_with_information_of_one_everywhere_is_l2(
    tiny: Path, topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ones = lambda model, *_, **__: {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}  # noqa: E731
    monkeypatch.setattr("overhaul.learners.answering.diagonal", ones)
    how = ("--head", "softmax", "--predictions", "0", "--weights", "0.5")
    plain = learnt("rehearsal-free", tiny, topics, tmp_path / "l2", *how, "--weight-term", "l2", "--no-anchor-first")
    weighed = learnt("rehearsal-free", tiny, topics, tmp_path / "ewc", *how, "--weight-term", "ewc")

    assert same(plain, weighed)


def test_only_what_is_asked_for_moves_and_what_is_learnt_is_told(tiny: Path, topics: Path, tmp_path: Path):
    how = ("--train", "qkv", "--classifier", "growing", "--weight-term", "l2", "--weights", "0.1", "--steps", "60")
    found, before = (
        learnt("rehearsal-free", tiny, topics, tmp_path / "out", *how),
        load_file(tiny / "model.safetensors"),
    )

    moved = {name for name in before if not torch.equal(found[name], before[name])}
    assert moved
    assert all({*name.split(".")} & {"q_proj", "k_proj", "v_proj"} for name in moved)
    assert set(found) - set(before) == {"score.weight"}
    record = task_record.read(tmp_path / "out")
    assert [one.unit for one in record.tasks] == ["texts", "texts"]
    assert [one.images for one in record.tasks] == [60 * 8, 60 * 8]
    assert record.matrices["class-IL"].num_examples == (12, 12)
    assert record.matrices["task-IL"].accuracy(2, 2) > 0.8
    tables = json.loads((tmp_path / "out" / "overhaul.json").read_text())["tables"]
    (drift,) = [table for table in tables if "linear CKA" in table["title"]]
    assert drift["columns"] == ["after", "model.layers.0", "model.layers.1", "what the head reads"]
    data = json.loads((tmp_path / "out" / "overhaul.json").read_text())["lineage"][-1]["data"]
    assert data["unit"] == "texts"


@pytest.mark.parametrize(
    "flags",
    [
        ("--output-term", "der++", "--memory", "16", "--passes", "joined", "--classifier", "growing"),
        ("--output-term", "fdr", "--memory", "16"),
        ("--output-term", "lwf", "--weight-term", "ewc", "--fisher-examples", "4"),
        ("--output-term", "none", "--weight-term", "vcl", "--first-std", "0.02"),
        ("--output-term", "er", "--memory", "16", "--refresh.every", "2", "--fisher-examples", "4"),
    ],
)
def test_every_term_of_classifiers_takes_texts(tiny: Path, topics: Path, tmp_path: Path, flags: tuple[str, ...]):
    learnt("bregman", tiny, topics, tmp_path / "out", *flags, "--steps", "4")

    kept = task_record.read(tmp_path / "out").tasks[-1].kept_bytes
    # Of each: 16 tokens and their mask, a label and the number of classes in int64, 4 logits in fp32.
    if "--memory" in flags:
        assert kept["memory"] == 16 * (8 * (2 * 16 + 2) + 4 * 4)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tiny: Path, topics: Path, tmp_path: Path):
    how = ("learn", "bregman", tiny, "--tasks", topics, "--split", "2", *FLAGS, "--save-every", "5", "--memory", "16",
           "--classifier", "growing")  # fmt: skip
    assert overhaul(*how, "-o", tmp_path / "whole").code == 0
    assert interrupted(lambda seen: len(seen) == 19, *how, "-o", tmp_path / "cut").code != 0
    done = overhaul(*how, "-o", tmp_path / "cut", "--resume")
    assert done.code == 0, done.err

    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


# The directory.


@pytest.fixture(scope="module")
def out(tiny: Path, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("learnt") / "out"
    learnt("rehearsal-free", tiny, topics, found, "--classifier", "growing", "--steps", "40")
    return found


def test_transformers_reads_the_directory_and_a_batch_says_what_each_text_says(out: Path):
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = ["purr meow", "sail anchor deck mast sail", "bark", "leaf root branch moss leaf root branch"]
    together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])

    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "ship", 3: "tree"}
    assert model.config.label2id == {"cat": 0, "dog": 1, "ship": 2, "tree": 3}
    assert model.config.pad_token_id == tokenizer.pad_token_id
    readme = (out / "README.md").read_text()
    assert "text-classification" in readme
    assert "AutoModelForSequenceClassification" in readme


def test_it_is_shown_compared_reported_and_refused_as_what_it_is(tiny: Path, topics: Path, out: Path, tmp_path: Path):
    other = tmp_path / "other"
    learnt("bregman", tiny, topics, other, "--output-term", "none", "--steps", "2")

    shown = json.loads(overhaul("show", out, "--json").out)
    assert shown["verified"]
    compared = overhaul("compare", out, other, "--json")
    assert compared.code == 0, compared.err
    assert "accuracy, class-IL" in compared.out
    told = overhaul("learn", "report", out, other, "-o", tmp_path / "page.html")
    assert told.code == 0, told.err
    refused(overhaul("prune", "magnitude", out, "-o", tmp_path / "p", "--sparsity", "0.5"), "text classifier")
    refused(overhaul("measure", "perplexity", out), "text classifier")
    refused(overhaul("compare", tiny, out), "models of different kinds: causal language model and text classifier")


def test_further_tasks_are_learnt_and_classes_keep_their_rows(out: Path, topics: Path, tmp_path: Path):
    path = tmp_path / "more.jsonl"
    rows = [{"text": f"stone {n} sand grain", "label": "rock"} for n in range(20)]
    path.write_text(topics.read_text() + "\n" + "\n".join(map(json.dumps, rows)))
    how = ("--batch-size", "8", "--seq-len", "16", "--dtype", "fp32", "--lr", "1e-9", "--steps", "1", "--heldout", "6",
           "--predictions", "0", "--weight-term", "none")  # fmt: skip
    done = overhaul("learn", "rehearsal-free", out, "-o", tmp_path / "again", "--tasks", path, *how)
    assert done.code == 0, done.err

    before, after = (load_file(where / "model.safetensors")["score.weight"] for where in (out, tmp_path / "again"))
    names = artifact.read_config(tmp_path / "again").label2id
    assert set(names) == {*WORDS, "rock"}
    for name, place in artifact.read_config(out).label2id.items():
        torch.testing.assert_close(after[names[name]], before[place], atol=1e-6, rtol=0)


def test_a_pruned_model_keeps_its_zeros(tiny: Path, topics: Path, tmp_path: Path):
    done = overhaul("prune", "magnitude", tiny, "-o", tmp_path / "pruned", "--sparsity", "0.5", "--evaluate", "none")
    assert done.code == 0, done.err
    found = learnt("rehearsal-free", tmp_path / "pruned", topics, tmp_path / "out", "--steps", "3")

    before = load_file(tmp_path / "pruned" / "model.safetensors")
    masked = [name for name in before if "_proj" in name]
    assert all((found[name][before[name] == 0] == 0).all() for name in masked)
    assert any(not torch.equal(found[name], before[name]) for name in masked)


def test_corpora_are_classes(tiny: Path, tmp_path: Path):
    for name, words in WORDS.items():
        said = " ".join(f"{word} {number}" for number in range(3000) for word in words.split())
        (tmp_path / f"{name}.txt").write_text(said)
    paths = [tmp_path / f"{name}.txt" for name in WORDS]
    how = ("--label-by", "corpus", "--split", "2", "--class-texts", "40", "--steps", "10", "--heldout", "5")
    done = overhaul("learn", "rehearsal-free", tiny, "-o", tmp_path / "out", "--tasks", *paths, *FLAGS[2:], *how)
    assert done.code == 0, done.err

    record = task_record.read(tmp_path / "out")
    assert record.matrices["class-IL"].names == ("cat.txt, dog.txt", "ship.txt, tree.txt")
    assert record.matrices["class-IL"].num_examples == (10, 10)


def test_bad_input_is_one_clear_error(tiny: Path, topics: Path, tmp_path: Path):
    def tried(*flags: object, method: str = "rehearsal-free", tasks: tuple[object, ...] = (topics,)) -> Any:
        named = ("--tasks", *tasks) if tasks else ()
        return overhaul("learn", method, tiny, "-o", tmp_path / "out", *named, "--seq-len", "16", *flags)

    labelled = ("--label-field", "label")
    refused(tried(), "these texts have no labels", "--label-field label")
    refused(tried("--label-field", "lable"), "has no column 'lable'", "did you mean 'label'")
    refused(tried(*labelled, "--split", "9"), "split 9 of topics.jsonl", "1 to 4")
    refused(tried(*labelled, "--variants", "plain"), "variants is of image sets, and these are texts")
    refused(tried(*labelled, "--label-by", "corpus"), "label_field is of tables")
    refused(tried("--label-by", "corpus", "--text-field", "said"), "text_field is of tables")
    refused(tried("--class-texts", "5", "--output-term", "none", method="bregman"), "--class-texts is of labelled")
    refused(tried(*labelled, tasks=()), "no texts are named")
    refused(tried(*labelled, tasks=(topics, topics)), "is named twice")
    again = write_topics(tmp_path / "again.jsonl", ("tree", "cat"), seed=1)
    refused(tried(*labelled, tasks=(topics, again)), "is in topics.jsonl and in again.jsonl")
    refused(tried(*labelled, "--output-term", "kl-replay", method="bregman"), "kl-replay is of language models")
    refused(tried(*labelled, "--seq-len", "4096"), "--seq-len 4096 is more than the model reads")
    assert not (tmp_path / "out").exists()
