"""Prompts after examples: what is asked, and what of the answers is kept."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from overhaul.synthetic import (
    NEARLY,
    Frame,
    NearDuplicates,
    Sieve,
    distinct_share,
    likeness,
    longest_runs,
    request,
    sequences,
)

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


def test_what_is_put_on_one_line_comes_back_as_it_was():
    frame = Frame("", "")
    texts = ["".join(letters) for length in range(7) for letters in itertools.product("\\n\na", repeat=length)]

    lines = [frame.inside(text) for text in texts]

    assert not any("\n" in line for line in lines)
    assert [frame.around(line) for line in lines] == texts
    assert frame.inside(r"\frac{a}{b}") == r"\frac{a}{b}"


@pytest.mark.parametrize("prompt", ["and they went home again", "sort 3 1", "it is :", "sort :"])
def test_nothing_is_cut_off_a_text_that_has_another_frame(prompt: str):
    assert Frame("sort ", " :").inside(prompt) == prompt


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


def test_near_duplicates_are_those_that_comparing_every_pair_finds():
    draw, near = random.Random(0), NearDuplicates()
    texts = [" ".join(draw.choices("abc", k=draw.randrange(30))) for _ in range(40)]
    for text in list(texts):
        words = text.split()
        for _ in range(4):  # the same with a word or two changed, put in or left out
            changed = list(words)
            for _ in range(draw.randint(0, 2)):
                place = draw.randint(0, len(changed))
                changed[place : place + draw.randint(0, 1)] = draw.choices("abcd", k=draw.randint(0, 1))
            texts.append(" ".join(changed))
    draw.shuffle(texts)

    found = []
    for text in texts:
        found.append(near.holds(text))
        near.add(text)

    runs = [sequences(text) for text in texts]
    expected = [
        any(own and len(own & other) >= NEARLY * len(own | other) for other in runs[:place])
        for place, own in enumerate(runs)
    ]
    assert found == expected
    assert 20 < sum(found) < len(texts) - 20


def test_runs_and_likeness():
    assert longest_runs(["a b c d", "A  B", "x"], [["x", "b", "c"], ["d", "a", "b"]]) == [2, 2, 1]
    assert longest_runs(["a"], []) == [0]
    assert longest_runs([], []) == []
    assert longest_runs(["a", ""], [[]]) == [0, 0]
    assert likeness("a b c", ["a b", "b c d"]) == pytest.approx(1 / 2)
    assert likeness("one", ["one"]) == 0
    assert distinct_share(["a b", "a b c"]) == pytest.approx(2 / 3)


def longest_run(text: str, others: list[list[str]]) -> int:
    """By the textbook's table of common suffixes."""
    words, best = text.split(), 0
    for other in others:
        before = [0] * (len(other) + 1)
        for word in words:
            row = [0] * (len(other) + 1)
            for place, theirs in enumerate(other, 1):
                if word == theirs:
                    row[place] = before[place - 1] + 1
            best, before = max(best, *row), row
    return best


def test_many_runs_at_once_are_those_found_one_by_one():
    draw = random.Random(0)
    for letters in ("ab", "abcdefgh"):
        for _ in range(60):
            texts, others = (
                [" ".join(draw.choices(letters, k=draw.randrange(14))) for _ in range(draw.randrange(6))]
                for _ in range(2)
            )
            words = [text.split() for text in others]

            assert longest_runs(texts, words) == [longest_run(text, words) for text in texts]


def test_many_runs_are_found_in_a_moment():
    draw, words = random.Random(0), [str(number) for number in range(200)]
    others = [draw.choices(words, k=60) for _ in range(2_000)]
    texts = [" ".join(other[20:50]) for other in others[:100]]

    began = time.perf_counter()
    assert longest_runs(texts, others) == [30] * 100
    assert time.perf_counter() - began < 30  # one by one it is minutes
