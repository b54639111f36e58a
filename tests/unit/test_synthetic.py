"""Prompts after examples: what is asked, and what of the answers is kept."""

from __future__ import annotations

import random

import pytest

from overhaul.synthetic import Frame, Sieve, distinct_share, likeness, longest_run, request

PROMPTS = ("sort 3 1 2 :", "sort 9 8 :", "sort 5 6 7 :")


@pytest.mark.parametrize(
    ("prompts", "frame"),
    [
        (PROMPTS, Frame("sort ", " :")),
        (("not True =", "not False ="), Frame("not ", " =")),
        (("abc", "abd"), Frame("", "")),
        (("Q: a\nA:", "Q: b\nA:"), Frame("Q: ", "\nA:")),
        (("same words", "same words and more"), Frame("same ", "")),
    ],
    ids=repr,
)
def test_the_frame_is_what_all_prompts_share_in_whole_words(prompts: tuple[str, ...], frame: Frame):
    assert Frame.of(prompts) == frame
    assert [frame.around(frame.inside(prompt)) for prompt in prompts] == list(prompts)


def test_a_prompt_of_several_lines_is_asked_for_on_one():
    frame = Frame("", "")

    assert frame.inside("a\nb") == "a\\nb"
    assert frame.around("a\\nb") == "a\nb"


def test_a_request_has_every_example_once_and_the_next_line_open():
    lines = request(PROMPTS, Frame.of(PROMPTS), random.Random(0)).split("\n")

    assert sorted(lines[:-1]) == ["Example: 3 1 2", "Example: 5 6 7", "Example: 9 8"]
    assert lines[-1] == "Example:"
    assert len({request(PROMPTS, Frame.of(PROMPTS), random.Random(seed)) for seed in range(20)}) > 1


def test_the_sieve_says_why():
    sieve = Sieve(PROMPTS, Frame.of(PROMPTS), longest=40)
    written = [
        " 4 4 1",
        "",
        "3  1 2",
        "4 4  1 ",
        "1 " * 40,
        "a b c d e f g h i j k l m n",
        "A b c d e f g h i j k l m o",
    ]

    kept = [sieve(line) for line in written]

    assert kept == ["sort 4 4 1 :", None, None, None, None, "sort a b c d e f g h i j k l m n :", None]
    assert sieve.dropped == {"empty": 1, "too long": 1, "a seed": 1, "met before": 2}
    assert sieve.unique_share == pytest.approx(2 / 5)


def test_runs_and_likeness():
    assert longest_run("a b c d", [["x", "b", "c"], ["d", "a"]]) == 2
    assert longest_run("A  B", [["a", "b"]]) == 2
    assert longest_run("a", []) == 0
    assert likeness("a b c", ["a b", "b c d"]) == pytest.approx(1 / 2)
    assert likeness("one", ["one"]) == 0
    assert distinct_share(["a b", "a b c"]) == pytest.approx(2 / 3)
