"""Novels by Jane Austen, out of the data base in which a package of R holds them."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from overhaul.fetch import debian

_IN_SAMPLE = "NORTHANGER ABBEY"


def novels() -> dict[str, list[str]]:
    """The chapters of five novels by the first line of each; the sixth is in the `sample` that comes along.

    Raises:
        UserError: the package cannot be had.
    """
    package = debian(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    )
    data = (package / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    return {lines[0]: list(_chapters("\n".join(lines))) for lines in _r_strings(data) if lines[0] != _IN_SAMPLE}


def _r_strings(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load data base, in the order they are stored.

    An entry is its length (4 bytes) and a zlib stream; inside, R's binary serialization: two bytes `X\\n`,
    three numbers, from version 3 on the name of an encoding, then the vector (R Internals, 1.8).
    """
    while database:
        inflate = zlib.decompressobj()
        entry = inflate.decompress(database[4:])
        database = inflate.unused_data
        version, _, _, name_bytes = struct.unpack_from(">4i", entry, 2)
        at = 18 + name_bytes if version == 3 else 14
        _, count = struct.unpack_from(">2i", entry, at)
        strings, at = [], at + 8
        for _ in range(count):
            _, length = struct.unpack_from(">2i", entry, at)
            strings.append(entry[at + 8 : at + 8 + length].decode())
            at += 8 + length
        yield strings


def _chapters(novel: str) -> Iterator[str]:
    """The chapters without headings, each paragraph on one line."""
    body = re.sub(r"(?m)^(?:VOLUME [IVX]+|FINIS|Finis|THE END)$", "", novel)
    for chapter in re.split(r"(?mi)^chapter (?:\d+|[ivxl]+)$", body)[1:]:
        paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", chapter))
        yield "\n\n".join(filter(None, paragraphs))
