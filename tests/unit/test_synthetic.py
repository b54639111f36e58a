"""Prompts after examples: what is asked, and what of the answers is kept."""

from __future__ import annotations

import random

import pytest

from overhaul.synthetic import Frame, Runs, Sieve, distinct_share, likeness, request

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
    assert Runs(["x b c", "d a"]).longest("a b c d") == 2
    assert Runs(["a b"]).longest("A  B") == 2
    assert Runs([]).longest("a") == 0
    assert likeness("a b c", ["a b", "b c d"]) == pytest.approx(1 / 2)
    assert likeness("one", ["one"]) == 0
    assert distinct_share(["a b", "a b c"]) == pytest.approx(2 / 3)


def test_the_longest_run_is_that_of_every_pair_of_places():
    dice = random.Random(0)

    def text() -> str:
        return " ".join(dice.choices("abc", k=dice.randrange(12)))

    def common(one: list[str], other: list[str]) -> int:
        return max(
            (
                next(
                    (n for n, (a, b) in enumerate(zip(one[i:], other[j:], strict=False)) if a != b),
                    min(len(one) - i, len(other) - j),
                )
                for i in range(len(one))
                for j in range(len(other))
            ),
            default=0,
        )

    for _ in range(50):
        others, own = [text() for _ in range(3)], text()
        assert Runs(others).longest(own) == max(common(own.split(), other.split()) for other in others)


@pytest.mark.parametrize("prompt", ["print('a\\nb')\nprint('c')", "back\\slash", "a\\\\n", "plain"])
def test_a_prompt_comes_back_from_its_line(prompt: str):
    frame = Frame("", "")

    assert "\n" not in frame.inside(prompt)
    assert frame.around(frame.inside(prompt)) == prompt


def test_a_text_without_the_frame_is_left_whole():
    assert Frame("sort ", " :").inside("any other text") == "any other text"
