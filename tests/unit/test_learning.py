"""Tasks one after the other: matrices, identities between methods, resuming, what a directory holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from command import interrupted, overhaul, refused
from images import write_cnn
from overhaul import artifact, journal, machine, task_record
from overhaul.forgetting import AccuracyMatrix, average_accuracy, backward_transfer
from overhaul.interop.classifier import classes_of
from overhaul.kinds import Kind
from overhaul.layers.variational import distributions
from overhaul.learn.bregman import Bregman
from overhaul.task_data import TaskData
from overhaul.task_scores import Scores, logits_of
from overhaul.tasks import open_tasks
from overhaul.train import train
from overhaul.workspace import finish

HOW: dict[str, Any] = {"batch_size": 8, "lr": 0.05, "epochs": 2.0}
OF_MEMORY = ("er", "der", "der++", "fdr")


def learn(
    cnn: Path, bars: Path, *, split: int = 2, seen: list[list[Tensor]] | None = None, **settings: Any
) -> tuple[Any, dict[str, AccuracyMatrix]]:
    """The model after all tasks, and its matrices; `seen` takes the parameters after each task."""
    made = artifact.load(cnn, kinds=(Kind.IMAGE_CLASSIFIER,))
    data = TaskData(open_tasks([str(bars)], split=split), made.processor, 1, seed=0)
    memory = {"memory": 24} if settings.get("output_term", "der++") in OF_MEMORY else {}
    method = Bregman(**{**HOW, **memory, **settings})
    machine.seed_everything(0)
    with journal.recording() as notes:
        for plan in method.stages(made.model, data):
            train(plan, method, quiet=True)
            finish(plan)
            if seen is not None:
                seen.append([p.detach().clone() for p in made.model.parameters()])
    (told,) = notes.tasks
    return made.model, dict(told.matrices)


def weights(model: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_a_memory_keeps_what_is_forgotten_without(cnn: Path, bars: Path):
    _, alone = learn(cnn, bars, split=4, output_term="none", epochs=4.0)
    _, replayed = learn(cnn, bars, split=4, output_term="er", alpha=1.0, epochs=4.0)

    assert average_accuracy(alone["class-IL"]) < 0.4, "the last class, whatever is shown"
    assert average_accuracy(replayed["class-IL"]) > average_accuracy(alone["class-IL"]) + 0.2
    assert backward_transfer(replayed["class-IL"]) > backward_transfer(alone["class-IL"])
    assert all(average_accuracy(replayed[k]) <= average_accuracy(replayed["task-IL"]) for k in replayed)


@pytest.mark.parametrize(
    "settings",
    [
        {"output_term": "lwf", "alpha": 0.0},
        {"output_term": "cpr", "alpha": 0.0},
        {"output_term": "none", "weight_term": "l2", "beta": 0.0},
        {"output_term": "none", "weight_term": "ewc", "beta": 0.0},
        {"output_term": "none", "refresh": {"every": 1, "rate": 0.0, "noise": 0.0}},
        {"output_term": "none", "refresh": {"every": 1, "form": "paper", "rate": 0.0, "noise": 1.0}},
    ],
)
def test_with_weight_zero_every_method_is_plain_training(cnn: Path, bars: Path, settings: dict[str, Any]):
    plain, _ = learn(cnn, bars, output_term="none")
    held, _ = learn(cnn, bars, **settings)

    assert same(plain, held)


def test_ewc_with_information_of_one_everywhere_is_l2(cnn: Path, bars: Path, monkeypatch: pytest.MonkeyPatch):
    ones = lambda model, *_, **__: {n: torch.ones_like(p) for n, p in model.named_parameters()}  # noqa: E731
    monkeypatch.setattr("overhaul.learners.answering.diagonal", ones)
    plain, _ = learn(cnn, bars, output_term="none", weight_term="l2", beta=0.3)
    weighed, _ = learn(cnn, bars, output_term="none", weight_term="ewc", beta=0.3)

    assert same(plain, weighed)
    assert not same(plain, learn(cnn, bars, output_term="none")[0])


def test_fdr_remembers_a_task_when_it_ends_with_what_the_model_says_then(cnn: Path, bars: Path):
    made = artifact.load(cnn, kinds=(Kind.IMAGE_CLASSIFIER,))
    data = TaskData(open_tasks([str(bars)], split=2), made.processor, 1, seed=0)
    learner: Any = (method := Bregman(**HOW, memory=24, output_term="fdr")).learner(made.model, data)
    learner.begin(0)
    train(learner.plan(0), method, quiet=True)
    assert len(learner.memory) == 0, "nothing of a task is held while it is learnt"

    learner.learnt(0)

    held = learner.memory.draw(24)
    now = made.model.eval()(pixel_values=held["pixel_values"]).logits
    assert torch.allclose(held["logits"], now, atol=1e-5)
    assert set(held["labels"].tolist()) == {0, 1}


def test_a_strong_pull_leaves_the_weights_where_they_were(cnn: Path, bars: Path):
    how: dict[str, Any] = {"output_term": "none", "weight_term": "l2", "lr": 0.02, "epochs": 8.0}
    moved = {}
    for beta in (0.0, 20.0):
        seen: list[list[Tensor]] = []
        learn(cnn, bars, **how, beta=beta, seen=seen)
        one, two = seen
        moved[beta] = sum(float((a - b).square().sum()) for a, b in zip(one, two, strict=True))

    assert moved[20.0] < 0.2 * moved[0.0]


VCL: dict[str, Any] = {"output_term": "none", "weight_term": "vcl", "first_std": 0.02}


def test_weights_without_spread_and_prior_are_plain_training(cnn: Path, bars: Path):
    # Few steps without clipping, and up to rounding: norms and products are summed in another order.
    how: dict[str, Any] = {"epochs": None, "steps": 2, "clip": 0.0}
    plain, _ = learn(cnn, bars, output_term="none", **how)
    certain, _ = learn(cnn, bars, **{**VCL, "beta": 0.0, "first_std": 1e-16}, **how)

    torch.testing.assert_close(weights(certain), weights(plain), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(weights(learn(cnn, bars, **VCL, **how)[0]), weights(plain), rtol=1e-4, atol=1e-5)


def test_refresh_learning_without_a_rate_leaves_vcl_as_it_is(cnn: Path, bars: Path):
    plain, _ = learn(cnn, bars, **VCL, samples=2)
    for form in ("released", "paper"):
        how = {"every": 1, "form": form, "rate": 1e-30, "noise": 0.0}
        assert same(plain, learn(cnn, bars, **VCL, samples=2, refresh=how)[0])


def test_refresh_learning_unlearns_weights_and_not_how_sure_they_are(cnn: Path, bars: Path):
    made = artifact.load(cnn, kinds=(Kind.IMAGE_CLASSIFIER,))
    data = TaskData(open_tasks([str(bars)], split=2), made.processor, 1)
    # Nothing is learnt to speak of: what moves was unlearnt.
    how = {"every": 1, "form": "paper", "rate": 1e-4, "noise": 1.0}
    plan = next(Bregman(**{**HOW, **VCL, "lr": 1e-30}, refresh=how).stages(made.model, data))
    before = {n: (m.detach().clone(), s.detach().clone()) for n, (m, s) in distributions(made.model).items()}
    train(plan, Bregman(**HOW), quiet=True)

    for name, (mean, log_std) in distributions(made.model).items():
        assert not torch.equal(mean, before[name][0])
        assert torch.equal(log_std, before[name][1])


def test_the_posterior_of_a_task_is_the_prior_of_the_next(cnn: Path, bars: Path):
    made = artifact.load(cnn, kinds=(Kind.IMAGE_CLASSIFIER,))
    data = TaskData(open_tasks([str(bars)], split=2), made.processor, 1)
    method = Bregman(**{**HOW, **VCL}, classifier="growing", optimizer="adamw", prior_std=0.5, beta=2.0)
    terms = []
    for plan in method.stages(made.model, data):
        weight, term = plan.objective.named()["believed"]
        assert weight == pytest.approx(2.0 / len(data.train[len(terms) // 2]))
        terms.append(term)
        train(plan, method, quiet=True)
        ends = {n: (m.detach().clone(), s.detach().clone()) for n, (m, s) in distributions(made.model).items()}
        finish(plan)
        terms.append(ends)
    first, ends, second, _ = terms

    assert all(not mean.any() and torch.allclose(s.exp(), torch.tensor(0.5)) for mean, s in first.before.values())
    head = "classifier.1.weight"
    assert set(second.before) == set(ends)
    for name, learnt in ends.items():
        for now, then in zip(second.before[name], learnt, strict=True):
            assert torch.equal(now[tuple(slice(size) for size in then.shape)], then)
    mean, log_std = second.before[head]
    assert mean.shape[0] == 4
    assert not mean[2:].any(), "new rows of the head have the prior"
    assert torch.allclose(log_std[2:].exp(), torch.tensor(0.5))
    assert not torch.allclose(ends[head][1].exp(), torch.tensor(0.02), rtol=1e-4), "spreads are learnt"


def test_accuracies_are_those_of_the_model(cnn: Path, bars: Path):
    model, told = learn(cnn, bars)
    data = TaskData(open_tasks([str(bars)], split=2), artifact.load(cnn, kinds=(Kind.IMAGE_CLASSIFIER,)).processor, 1)
    for number, examples in enumerate(data.heldout):
        logits_NC, labels_N = logits_of(model, examples, dtype=torch.float32), torch.from_numpy(examples.labels_N)
        own = list(data.sequence.tasks[number].classes)
        within = torch.tensor(own)[logits_NC[:, own].argmax(1)] == labels_N
        assert told["class-IL"].accuracy(2, number + 1) == pytest.approx(
            float((logits_NC.argmax(1) == labels_N).double().mean())
        )
        assert told["task-IL"].accuracy(2, number + 1) == pytest.approx(float(within.double().mean()))
    assert told["class-IL"].accuracy(1, 1) == told["task-IL"].accuracy(1, 1), "one task: nothing else to choose from"
    assert told["class-IL"].has(0, 2), "a whole head is measured before the first task"


def test_a_growing_head_gets_rows_with_their_task_and_keeps_their_names(cnn: Path, bars: Path):
    model, told = learn(cnn, bars, classifier="growing", output_term="der++")

    assert classes_of(model) == ("0", "1", "2", "3")
    assert not told["class-IL"].has(0, 1), "before it there is nothing to measure"
    assert average_accuracy(told["task-IL"]) > 0.7


def test_one_task_is_ordinary_training(cnn: Path, bars: Path):
    _, told = learn(cnn, bars, split=1, epochs=6.0)

    assert told["class-IL"].num_tasks == 1
    assert average_accuracy(told["class-IL"]) > 0.9


def test_scores_before_all_tasks_are_learnt_have_gaps(cnn: Path, bars: Path):
    made = artifact.load(write_cnn(cnn.parent / "four", classes=4), kinds=(Kind.IMAGE_CLASSIFIER,))
    scores = Scores(TaskData(open_tasks([str(bars)], split=2), made.processor, 1))
    scores.take(lambda number, tasks: logits_of(made.model, scores.data.heldout[number], dtype=torch.float32), 1)

    matrix = scores.matrix("class-IL")
    assert matrix.has(1, 1)
    assert not matrix.has(1, 2)
    assert not matrix.has(2, 1)
    assert np.isnan(matrix.values).sum() == 3


# The command.

PLAIN = ("--split", "2", "--batch-size", "8", "--epochs", "2", "--dtype", "fp32")
FLAGS = (*PLAIN, "--memory", "24")


def test_the_directory_is_one_that_transformers_reads(cnn: Path, bars: Path, tmp_path: Path):
    done = overhaul("learn", "bregman", cnn, "-o", tmp_path / "out", "--tasks", bars, *FLAGS)
    assert done.code == 0, done.err

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    given = processor([np.zeros((8, 8, 1), np.uint8)], input_data_format="channels_last", return_tensors="pt")
    assert model(**given).logits.shape == (1, 4)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2", 3: "3"}
    assert "accuracy, class-IL" in done.out
    record = json.loads((tmp_path / "out" / "overhaul.json").read_text())
    assert record["lineage"][-1]["fields"]["tasks"] == [str(bars)]
    assert record["lineage"][-1]["data"]["name"] == str(bars)
    tasks = task_record.read(tmp_path / "out").tasks
    assert [(one.name, one.steps, one.images) for one in tasks] == [("0, 1", 12, 96), ("2, 3", 12, 96)]
    assert {one.trained_parameters for one in tasks} == {sum(p.numel() for p in model.parameters())}
    assert all(one.seconds > 0 for one in tasks)
    # Of each: 8 x 8 pixels and 4 logits in fp32, a label and the number of classes in int64.
    assert [one.kept_bytes for one in tasks] == [{"memory": 24 * (4 * (64 + 4) + 2 * 8)}] * 2


@pytest.mark.parametrize("terms", [(), ("--weight-term", "vcl", "--samples", "2", "--classifier", "growing")])
def test_a_run_that_was_stopped_in_the_second_task_goes_on_to_the_same_bits(
    terms: tuple[str, ...], cnn: Path, bars: Path, tmp_path: Path
):
    how = ("learn", "bregman", cnn, "--tasks", bars, *FLAGS, "--save-every", "3", "--refresh.every", "2", *terms)
    assert overhaul(*how, "-o", tmp_path / "whole").code == 0
    assert interrupted(lambda seen: len(seen) == 17, *how, "-o", tmp_path / "cut").code != 0
    assert (tmp_path / "cut" / ".state" / "stage-002").is_dir()
    done = overhaul(*how, "-o", tmp_path / "cut", "--resume")
    assert done.code == 0, done.err

    for file in ("model.safetensors", *(["posterior.safetensors"] if terms else [])):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    whole, cut = (json.loads((tmp_path / name / "tasks.json").read_text()) for name in ("whole", "cut"))
    assert all(task.pop("seconds") > 0 for told in (whole, cut) for task in told["tasks"])
    assert whole == cut


def test_what_is_kept_is_told_by_what_it_is(cnn: Path, bars: Path):
    made = artifact.load(cnn, kinds=(Kind.IMAGE_CLASSIFIER,))
    data = TaskData(open_tasks([str(bars)], split=2), made.processor, 1, seed=0)
    method = Bregman(**{**HOW, "output_term": "lwf", "weight_term": "ewc"})

    with journal.recording() as notes:
        for plan in method.stages(made.model, data):
            train(plan, method, quiet=True)
            finish(plan)

    weights = sum(p.nbytes for p in made.model.parameters())
    buffers = sum(buffer.nbytes for buffer in made.model.buffers())
    kept = {"weights before": weights, "Fisher information": weights, "old model": weights + buffers}
    assert [one.kept_bytes for one in notes.tasks[0].tasks] == [kept, kept]


def test_means_are_a_model_and_spreads_stand_beside_it(cnn: Path, bars: Path, tmp_path: Path):
    vcl = ("--output-term", "none", "--weight-term", "vcl", "--first-std", "0.02")
    done = overhaul("learn", "bregman", cnn, "-o", tmp_path / "out", "--tasks", bars, *PLAIN, *vcl)
    assert done.code == 0, done.err

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    stds = load_file(tmp_path / "out" / "posterior.safetensors")
    means = dict(model.named_parameters())
    assert all(stds[name].shape == means[name].shape and (stds[name] > 0).all() for name in stds)
    assert {name for name in means if name not in stds} == {n for n in means if "normalization" in n}
    assert artifact.verify(tmp_path / "out"), "the posterior is no weight file"

    # A later step writes the model that it made, and no posterior of the one before.
    more = ("--tasks", bars, *PLAIN, "--output-term", "none")
    assert overhaul("learn", "bregman", tmp_path / "out", "-o", tmp_path / "more", *more).code == 0
    assert not (tmp_path / "more" / "posterior.safetensors").exists()


def test_a_dry_run_counts_images_and_writes_nothing(cnn: Path, bars: Path, tmp_path: Path):
    done = overhaul("learn", "bregman", cnn, "-o", tmp_path / "out", "--tasks", bars, *FLAGS, "--dry-run")

    assert done.code == 0, done.err
    assert "12 steps, 96 images in each stage" in done.err
    assert "memory(24, draws of 8 x 2)" in done.err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_clear_error(cnn: Path, bars: Path, tiny: Path, tmp_path: Path):
    out = ("-o", tmp_path / "out")
    refused(overhaul("learn", "bregman", cnn, *out), "no image set is named")
    refused(overhaul("learn", "bregman", cnn, *out, "--tasks", bars, "--split", "9"), "split 9 of bars.npz")
    refused(overhaul("learn", "bregman", cnn, *out, "--tasks", bars, "--data", "sample"), "--data is of methods that")
    for flag, text in (
        ("--seq-len", "--seq-len is of text"),
        ("--heldout", "--heldout is of text"),
        ("--eval-every", "eval_every: tasks are measured"),
    ):
        refused(overhaul("learn", "bregman", cnn, *out, "--tasks", bars, flag, "9"), text)
    refused(overhaul("learn", "rehearsal-free", tiny, *out, "--tasks", bars), "these texts have no labels")
    refused(overhaul("prune", "magnitude", cnn, *out, "--sparsity", "0.5"), "is a model of another kind: image")
    refused(
        overhaul("learn", "bregman", cnn, *out, "--tasks", bars, "--memory", "4"),
        "a step draws 32 examples from a memory of 4",
    )
    for term, flag, value, text in (
        ("none", "--memory", 9, "memory is of output_term er, der, der++, fdr, kl-replay; leave it out"),
        ("lwf", "--memory-batch", 9, "memory_batch is of output_term er"),
        ("fdr", "--passes", "joined", "passes is of output_term er, der, der++ and kl-replay"),
        ("none", "--alpha", 1, "alpha is of an output term"),
        ("er", "--label-weight", 1, "label_weight is of output_term der++"),
        ("er", "--temperature", 1, "temperature is of output_term lwf and kl-replay"),
        ("er", "--beta", 2, "beta is of a weight term"),
        ("er", "--samples", 2, "samples is of weight_term vcl"),
        ("er", "--prior", "given", "prior is of weight_term vcl"),
        ("er", "--prior-std", 2, "prior_std is of weight_term vcl"),
        ("er", "--first-std", 0.1, "first_std is of weight_term vcl"),
        ("er", "--fisher", "empirical", "fisher is of weight_term ewc, and of refresh with fisher diag"),
        ("er", "--fisher-examples", 9, "fisher_examples is of weight_term ewc"),
        ("er", "--fisher-decay", 0.5, "fisher_decay is of weight_term ewc"),
    ):
        unread = ("--output-term", term, flag, value)
        refused(overhaul("learn", "bregman", cnn, *out, "--tasks", bars, *unread), text)
    blind = ("--refresh.every", 2, "--refresh.fisher", "none", "--fisher-examples", 9)
    refused(overhaul("learn", "bregman", cnn, *out, "--tasks", bars, *blind), "fisher_examples is of weight_term ewc")
    seldom = ("--refresh.rate", "1e-4")
    refused(overhaul("learn", "bregman", cnn, *out, "--tasks", bars, *seldom), "rate is of refresh learning")
    decay = ("--weight-term", "vcl", "--weight-decay", "0.1")
    refused(
        overhaul("learn", "bregman", cnn, *out, "--tasks", bars, *decay), "vcl has a prior in place of weight decay"
    )
    refused(overhaul("learn", "bregman", cnn, *out, "--tasks", bars, "--first-std", "0"), "first_std = 0.0")
    assert not (tmp_path / "out").exists()
