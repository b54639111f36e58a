"""Train, calib and heldout: disjoint, of the right sizes, the same in any order, without leaks."""

import random

import pytest

from overhaul.documents import Row, row_text, text_row
from overhaul.errors import UserError
from overhaul.split import HELDOUT_FLOOR_BYTES, leaks, num_bytes, share, split


def prose(seed: int, num_words: int) -> str:
    words = random.Random(seed)
    return " ".join("".join(words.choices("abcdefgh", k=5)) for _ in range(num_words))


def documents(count: int, num_words: int = 400) -> list[Row]:
    return [text_row(prose(seed, num_words)) for seed in range(count)]


def size(rows) -> int:
    return sum(map(num_bytes, rows))


def test_parts_are_a_partition_in_the_order_of_the_source():
    rows = documents(200)

    found = split(rows)

    parts = (found.train, found.calib, found.heldout)
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
    for part in parts:
        assert [row for row in rows if row in part] == list(part)


def test_the_order_of_the_rows_does_not_change_who_is_held_out():
    rows = documents(100)

    assert set(split(rows).heldout) == set(split(rows[::-1]).heldout)


def test_a_large_corpus_holds_out_a_twentieth_and_a_small_one_an_eighth():
    assert share(10_000_000, HELDOUT_FLOOR_BYTES) == 0.05
    assert share(400_000, HELDOUT_FLOOR_BYTES) == 0.09
    assert share(10_000, HELDOUT_FLOOR_BYTES) == 0.125

    rows = documents(600)
    found = split(rows)
    assert size(found.heldout) / size(rows) == pytest.approx(0.05, abs=0.005)
    assert size(found.calib) / size(rows) == pytest.approx(0.05, abs=0.005)


def test_one_long_document_is_cut_in_order_at_paragraphs():
    text = "\n\n".join(prose(seed, 50) for seed in range(80))

    found = split([text_row(text)])

    pieces = [row["text"] for part in (found.train, found.calib, found.heldout) for row in part]
    assert len(pieces) == 3
    assert "\n\n".join(pieces) == text
    assert {row.document for part in (found.train, found.calib, found.heldout) for row in part} == {text_row(text).id}


def test_one_line_without_paragraphs_is_cut_between_words():
    text = prose(0, 1000)

    found = split([text_row(text)])

    pieces = [row["text"].strip() for part in (found.train, found.calib, found.heldout) for row in part]
    assert " ".join(pieces) == text


def test_a_giant_among_small_documents_stays_in_train():
    giant = text_row(prose(1000, 10_000))

    assert giant in split([*documents(100), giant]).train


def test_equal_documents_stay_together():
    found = split(documents(60) * 2)

    assert not leaks(found.train + found.calib, found.heldout)
    assert found.rows_removed == 0
    assert len(found.heldout) == 2 * len(set(found.heldout))


def test_a_line_that_the_heldout_text_repeats_is_removed_from_train():
    licence = "Permission is hereby granted, free of charge, to any person obtaining this."
    rows = [text_row(f"{licence}\n{row['text']}") for row in documents(100)]

    found = split(rows)

    assert not leaks(found.train + found.calib, found.heldout)
    assert found.lines_removed == len(found.train) + len(found.calib)
    assert all(row["text"].startswith(licence) for row in found.heldout)
    assert {row.document for row in (*found.train, *found.calib, *found.heldout)} == {row.id for row in rows}


def test_a_sentence_inside_a_line_is_removed_and_its_neighbours_stay():
    shared = "This very sentence stands in each of the documents of this corpus."
    rows = [text_row(f"Before {i}. {shared} After {i}.\n{row['text']}") for i, row in enumerate(documents(100))]

    found = split(rows)

    assert not leaks(found.train, found.heldout)
    for row in found.train:
        first, second = row["text"].split("\n")[0].split(". ")
        assert first.startswith("Before")
        assert second.startswith("After")


def test_short_lines_may_repeat():
    rows = [text_row(f"import sys\n{row['text']}") for row in documents(100)]

    assert split(rows).lines_removed == 0


def test_examples_are_compared_by_what_they_train_on_and_removed_whole():
    system = "You are a helpful assistant who answers in one short sentence, always. "
    answers = [prose(i // 2, 20) for i in range(100)]  # each twice
    rows = [Row((("prompt", f"{system}{i}"), ("completion", answer))) for i, answer in enumerate(answers)]

    found = split(rows)

    assert not leaks(found.train + found.calib, found.heldout)
    assert len(found.train) + len(found.calib) + len(found.heldout) + found.rows_removed == 100
    assert 0 < found.rows_removed <= len(found.heldout)


def test_the_leak_check_sees_a_planted_leak():
    rows = documents(3)
    line = row_text(rows[0])[0][0]

    assert leaks([text_row(f"short\n  {line}")], rows) == [line]
    assert rows[0].id in leaks(rows[:1], rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([text_row("word")], "too short"),
        (
            [text_row("\n".join(["the same line again and again, fifty characters long"] * 100))],
            "nothing is left",
        ),
        ([Row((("question", "q"), ("answer", "a")))] * 2, "2 rows cannot be split"),
    ],
)
def test_too_little_text_is_a_user_error(rows, message):
    with pytest.raises(UserError, match=message):
        split(rows)
