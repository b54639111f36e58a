"""Which pairs are kept, and why the others are not."""

from __future__ import annotations

import pytest

from overhaul.question_sieve import Forbidden, PairSieve
from overhaul.question_templates import Pair

LONG = "How many ships of the line lay in the harbour of Brest on the day before the storm?"


def pair(question: str, answer: str = "a tower", text: str = "") -> Pair:
    return Pair(question, answer, "page", None, text)


def test_the_sieve_says_why():
    sieve = PairSieve(longest=90, shown=["Why is it dark?"])
    sieve.forbidden.add(["What is a buoy?"])
    given = [
        (pair("What is a lighthouse?"), ""),
        (pair(""), "empty or unfinished"),
        (pair("What is a sloop?", " . "), "empty or unfinished"),
        (pair("Tell me of sloops."), "not a question"),
        (pair("Why so?"), "not a question"),
        (pair("What is\na sloop?"), "not a question"),
        (pair("What is a sloop?", "x" * 91), "too long"),
        (pair("what  is a LIGHTHOUSE?"), "duplicate"),
        (pair("Why is it dark?"), "duplicate"),
        (pair(LONG), ""),
        (pair(LONG.replace("storm", "gale")), "near duplicate"),
        (pair("What is a buoy?"), "in a test"),
    ]

    kept = [sieve(one) for one, _ in given]

    assert kept == [not why for _, why in given]
    reasons = [why for _, why in given if why]
    assert {why: count for why, count in sieve.dropped.items() if count} == {why: reasons.count(why) for why in reasons}
    assert sieve.made == len(given)
    assert sieve.dropped_share == pytest.approx(len(reasons) / len(given))
    assert "2 duplicate" in sieve.counts()


def test_a_pair_that_was_dropped_is_no_duplicate_of_the_next():
    sieve = PairSieve(longest=90)

    assert not sieve(pair("What is a sloop?", ""))
    assert sieve(pair("What is a sloop?"))


def test_the_words_of_an_answer_are_looked_for_in_the_text():
    sieve = PairSieve(longest=90, overlap=0.5)

    assert sieve(pair("What is at Brest?", "ships, 40 of them", "There were 40 ships there."))
    assert not sieve(pair("What is at Toulon?", "nothing that anybody knows", "There were 40 ships there."))
    assert sieve(pair("What is at Cadiz?", "of no page at all"))
    assert sieve.dropped["not from the page"] == 1


def test_a_run_of_words_is_enough_to_be_tested_and_a_shorter_one_is_not():
    tested = Forbidden(8)
    tested.add([f"Say: {LONG}"])
    words = LONG.split()

    assert tested.holds(LONG.upper().replace("the", "the,"))
    assert tested.holds(" ".join(["Once", *words[3:11], "or", "not?"]))
    assert not tested.holds(" ".join(["Once", *words[3:10], "or", "not", "at", "all?"]))
    assert tested.items == 1


def test_a_short_question_is_tested_where_it_is_the_same():
    tested = Forbidden(8)
    tested.add(["What is 2 + 3?"])

    assert tested.holds("what is 2  + 3 ?")
    assert not tested.holds("What is 2 * 3?")
    assert not tested.holds("What is 2 + 30?")


def test_what_is_added_to_the_tests_later_is_dropped_later():
    sieve = PairSieve(longest=90)
    one = pair("What is a lighthouse?")

    assert sieve(one)
    assert sieve.is_still_good(one)
    sieve.forbidden.add([one.question])
    assert not sieve.is_still_good(one)
    assert sieve.dropped["in a test"] == 1
