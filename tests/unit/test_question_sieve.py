"""Which pairs are kept, and why the others are not."""

from __future__ import annotations

import pytest

from overhaul.question_sieve import Forbidden, PairSieve, is_question
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


def test_a_short_question_is_tested_where_it_is_the_same():
    tested = Forbidden(8)
    tested.add(["What is 2 + 3?"])

    assert tested.holds("what is 2  + 3 ?")
    assert not tested.holds("What is 2 * 3?")
    assert not tested.holds("What is 2 + 30?")


def test_a_short_question_is_tested_where_it_stands_in_a_longer_item():
    tested = Forbidden(8)
    tested.add(["Question: Where would you find a buoy?\nAnswer:", f"{LONG} What is a buoy?"])

    assert tested.holds("Where would you find a buoy?")
    assert tested.holds("What is a buoy?")
    assert tested.holds("How many ships of the line?")
    assert not tested.holds("Where would you find a sloop?")
    assert not tested.holds("a buoy answer how?")
    assert not tested.holds("What a buoy?")


def test_a_short_item_is_tested_where_it_stands_in_a_longer_question():
    tested = Forbidden(8)
    tested.add(["What is 2 + 3?", "Why so?"])

    assert tested.holds("Please tell me now: what is 2 + 3?")
    assert tested.holds("Please tell me at once, for I must know: what is 2 + 3, and why?")
    assert not tested.holds("Please tell me now: what is 2 + 30?")
    assert not tested.holds("Tell me, why so?")  # two words are met everywhere
    assert tested.holds("Why so?")


def test_an_answer_is_trained_on_and_so_it_is_looked_at_too():
    sieve = PairSieve(longest=200)
    sieve.forbidden.add([LONG])
    leaked = pair("What is known of that day?", f"They asked: {LONG.lower()} Nobody knew.")

    assert not sieve(leaked)
    assert sieve.dropped["in a test"] == 1
    assert not sieve.is_still_good(leaked)
    across = LONG.split()
    assert sieve.forbidden.holds(" ".join(across[:5]) + " so?", "") is False
    assert sieve.forbidden.holds(" ".join(["So", *across[:4]]) + "?", " ".join(across[4:9]))
    assert sieve(pair("What is a buoy?", "a float on the line"))


@pytest.mark.parametrize("run_words", [1, 2, 3, 8])
def test_runs_are_those_that_a_plain_search_finds(run_words: int):
    items = ["a b c d e f g h i", "x y z", "b c", "p q r s t"]
    asked = ["a b", "b c d e", "c d e f g h i k", "x y z", "u x y z", "v p q r s t u", "d e f g h", "k l", "q r s t"]
    fewest = min(4, run_words)

    def expected(text: str) -> bool:
        words = text.split()
        for other in (item.split() for item in items):
            shared = [
                n for n in range(1, 10) for i in range(len(words) - n + 1) for j in range(len(other) - n + 1)
                if words[i : i + n] == other[j : j + n]
            ]  # fmt: skip
            longest = max(shared, default=0)
            enough = min(run_words, max(fewest, min(len(words), len(other))))
            if words == other or longest >= enough:
                return True
        return False

    tested = Forbidden(run_words)
    tested.add(items[:2])
    tested.add(items[2:])
    assert [tested.holds(text) for text in asked] == [expected(text) for text in asked]


def test_a_question_of_a_script_without_spaces_is_one():
    sieve = PairSieve(longest=90)
    sieve.forbidden.add(["昨天港口里的灯塔是谁建造的?"])

    assert is_question("灯塔是什么？")  # noqa: RUF001
    assert not is_question("谁？")  # noqa: RUF001
    assert not is_question("灯塔。")
    assert sieve(pair("灯塔是什么？", "一座塔"))  # noqa: RUF001
    assert not sieve(pair("请问:港口里的灯塔是谁建造的？", "国王"))  # noqa: RUF001
    assert sieve.dropped["in a test"] == 1


def test_what_is_added_to_the_tests_later_is_dropped_later():
    sieve = PairSieve(longest=90)
    one = pair("What is a lighthouse?")

    assert sieve(one)
    assert sieve.is_still_good(one)
    sieve.forbidden.add([one.question])
    assert not sieve.is_still_good(one)
    assert sieve.dropped["in a test"] == 1
