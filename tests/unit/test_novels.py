"""Novels out of a data base of R: strings as R writes them, chapters without their headings."""

from __future__ import annotations

import zlib

from overhaul import novels


def test_r_strings_reads_what_r_writes():
    def number(*values: int) -> bytes:
        return b"".join(value.to_bytes(4, "big") for value in values)

    words = b"".join(number(9, len(word)) + word for word in (b"Emma", "café".encode(), b""))
    version_2 = b"X\n" + number(2, 0, 0) + number(16, 3) + words
    version_3 = b"X\n" + number(3, 0, 0) + number(5) + b"UTF-8" + number(16, 3) + words

    database = b"".join(number(len(entry)) + zlib.compress(entry) for entry in (version_2, version_3))

    assert list(novels._r_strings(database)) == [["Emma", "café", ""]] * 2


def test_chapters_lose_headings_and_line_breaks():
    novel = "EMMA\n\nVOLUME I\n\nCHAPTER I\n\nEmma was\nhandsome.\n\nClever.\n\nCHAPTER II\n\nRich.\n\nFINIS"

    assert list(novels._chapters(novel)) == ["Emma was handsome.\n\nClever.", "Rich."]
