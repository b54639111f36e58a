"""Shares of a mixture: as typed, from YAML with groups, and the volumes that a published table gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overhaul.shares import fed_back, flat, parse, spelled_out, volumes

# Chen et al., 2024 (Llama-3-SynE): Chinese : English, then Chinese : English : synthetic, with the same shares inside.
ZH = {"web-zh": 0.70, "encyclopedia-zh": 0.05, "books-zh": 0.20, "qa-zh": 0.05}
EN = {
    "web-en": 0.40,
    "encyclopedia-en": 0.05,
    "books-en": 0.15,
    "qa-en": 0.05,
    "papers-en": 0.10,
    "math-en": 0.10,
    "code-en": 0.15,
}
STAGE_ONE = {"zh": {"share": 0.2, "of": ZH}, "en": {"share": 0.8, "of": EN}}
STAGE_TWO = {"zh": {"share": 0.1, "of": ZH}, "en": {"share": 0.7, "of": EN}, "synthetic": 0.2}


def test_the_volumes_of_the_published_table():
    """In billions of tokens; 92.5 and 7.5 make 100."""
    made = volumes([(92.5, flat(STAGE_ONE, "one")), (7.5, flat(STAGE_TWO, "two"))])

    assert math.isclose(made["web-zh"], 13.475)
    assert math.isclose(made["web-en"], 31.7)
    assert math.isclose(made["synthetic"], 1.5)
    assert math.isclose(math.fsum(made.values()), 100)


def test_what_was_typed():
    assert parse(["sample=0.25", "a=b.jsonl=0.5"]) == {"sample": 0.25, "a=b.jsonl": 0.5}
    assert parse([]) == {}


def test_shares_may_be_all_there_is():
    assert math.fsum(parse(["a=0.1", "b=0.2", "c=0.7"]).values()) == pytest.approx(1)


def test_a_file_of_groups(tmp_path: Path):
    file = tmp_path / "shares.yaml"
    file.write_text("en: {share: 0.75, of: {sample: 0.6, stdlib: 0.4}}\nmanpages-de: 0.25\n")

    assert parse(spelled_out([str(file), "boolq-passages=0.1"])[:3]) == pytest.approx(
        {"sample": 0.45, "stdlib": 0.3, "manpages-de": 0.25}
    )


def test_the_top_of_a_file_may_leave_something(tmp_path: Path):
    file = tmp_path / "shares.yaml"
    file.write_text("en: {share: 0.5, of: {sample: 0.6, stdlib: 0.4}}\nmanpages-de: 2e-1\n")

    assert spelled_out([str(file)]) == ("sample=0.3", "stdlib=0.2", "manpages-de=0.2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 0.5\na: 0.5\n", "a comes twice"),
        ("a: 0.7\nb: 0.5\n", "sum to 1.2, not to 1 or less"),
        ("g: {share: 0.5, of: {a: 0.5}}\n", "sum to 0.5, not to 1"),
        ("a: [0.5\n", "shares.yaml"),
    ],
)
def test_files_that_hold_no_shares(tmp_path: Path, text: str, says: str):
    file = tmp_path / "shares.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        spelled_out([str(file)])


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (["sample"], "'sample' is no CORPUS=SHARE"),
        (["sample=much"], "is no CORPUS=SHARE"),
        (["=0.5"], "is no CORPUS=SHARE"),
        (["sample=0"], "above 0 and at most 1"),
        (["sample=nan"], "above 0 and at most 1"),
        (["sample=0.2", "sample=0.3"], "sample comes twice"),
        (["sample=0.7", "stdlib=0.5"], "0.7 of sample \\+ 0.5 of stdlib sum to 1.2"),
    ],
)
def test_what_is_no_share(entries: list[str], says: str):
    with pytest.raises(ValueError, match=says):
        parse(entries)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"a": 0.5, "b": 0.4}, "sum to 0.9, not to 1"),
        ({"a": 0.5, "g": {"share": 0.5, "of": {"b": 0.5}}}, "mix, g: the shares 0.5 of b sum to 0.5"),
        ({"a": 0.5, "g": {"share": 0.5, "of": {"a": 1}}}, "a comes twice"),
        ({"g": {"share": 1}}, "a group has share and of"),
        ({"a": "half"}, "the share of a is 'half'"),
        ({"a": True}, "the share of a is True"),
        (["a"], "is no mapping"),
        ({}, "is no mapping"),
    ],
)
def test_groups_that_are_none(told: Any, says: str):
    with pytest.raises(ValueError, match=says):
        flat(told, "mix")


def test_topics_that_became_worse_get_more_and_shares_stay_shares():
    shares = {"law": 0.1, "art": 0.2, "sport": 0.3, "food": 0.1}
    change = {"law": 6.0, "art": -1.0, "sport": 0.0, "food": -3.0}

    changed = fed_back(shares, change, 0.5)
    assert changed["law"] / shares["law"] > changed["sport"] / shares["sport"] > changed["food"] / shares["food"]
    assert math.isclose(math.fsum(changed.values()), 0.7)
    assert fed_back(shares, change, 0.0) == pytest.approx(shares)
    assert fed_back(shares, dict.fromkeys(shares, 0.0), 5.0) == pytest.approx(shares)


@given(
    st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(-1e3, 1e3)), min_size=2, max_size=6),
    st.floats(0, 100),
)
def test_no_topic_is_starved_or_takes_all(topics: list[tuple[float, float]], strength: float):
    """Before they are made parts of their sum again, no share more than doubles, none is less than half."""
    total = math.fsum(share for share, _ in topics)
    shares = {str(n): share / total for n, (share, _) in enumerate(topics)}
    changed = fed_back(shares, {str(n): change for n, (_, change) in enumerate(topics)}, strength)

    assert math.isclose(math.fsum(changed.values()), 1)
    assert all(shares[name] / 4 <= share * (1 + 1e-9) and share <= 4 * shares[name] for name, share in changed.items())


def test_a_perplexity_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="the perplexity of a is not finite"):
        fed_back({"a": 0.5, "b": 0.5}, {"a": math.nan, "b": 1.0}, 1.0)
