from __future__ import annotations

import pytest
from pydantic import ValidationError

from overhaul.bct.scheme import LONGEST_INNER, PARTS, Scheme, block_of, is_clamped


@pytest.mark.parametrize(
    ("text", "block"),
    [("1x64", (1, 64)), ("16x4", (16, 4)), ("row", (1, 96)), ("tensor", (32, 96)), ("99x999", (32, 96))],
)
def test_a_block_is_never_larger_than_the_matrix(text, block):
    assert block_of(text, (32, 96)) == block
    assert is_clamped(text, (32, 96)) == (text == "99x999")


@pytest.mark.parametrize("text", ["0x64", "64", "1x", "x", "-1x64", "rows", "1x0"])
def test_what_is_no_block_is_refused(text):
    with pytest.raises(ValidationError, match="is no block; allowed: ROWSxCOLUMNS"):
        Scheme(block=text)


@pytest.mark.parametrize("mode", ["w2a8", "w8a16", "w8"])
def test_other_widths_are_refused(mode):
    with pytest.raises(ValidationError):
        Scheme(mode=mode)


def test_a_mode_says_which_parts_there_are():
    assert [part for part in PARTS if Scheme(mode="w4a8").has(part)] == list(PARTS)
    assert [part for part in PARTS if Scheme(mode="w4a32").has(part)] == ["weights", "embedding"]
    assert (Scheme(mode="w4a8").bits, Scheme(mode="w8a32").bits) == (4, 8)


def test_parts_stand_in_one_order():
    assert Scheme(parts=("norm", "weights", "norm")).parts == ("weights", "norm")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parts": ()}, "nothing would be compressed"),
        ({"mode": "w8a32", "parts": ("norm",)}, "stores weights and embedding only"),
        ({"accumulate": "integer", "scale": "fp16"}, "summed by shifting"),
        ({"activation_block": 0}, "greater than 0"),
        ({"parts": ("gelu",)}, "Input should be"),
    ],
)
def test_what_contradicts_itself_is_refused(fields, said):
    with pytest.raises(ValidationError, match=said):
        Scheme(**fields)


def test_an_int32_holds_the_longest_sum_and_not_one_more():
    assert LONGEST_INNER * 127**2 < 2**31 <= (LONGEST_INNER + 1) * 127**2
