"""Manual pages as plain prose: paragraphs on one line each, no markup left.

Understands what pages written with the `man` macros use (man(7), groff_char(7), groff(7)). It is a reader of
text, not a typesetter: tables and equations are left out.
"""
# ruff: noqa: RUF001 - typographic characters are what the table below is for

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_UNWANTED_SECTIONS = {
    "COPYRIGHT",
    "COLOPHON",
    "TRANSLATION",
    "ÜBERSETZUNG",
    "REPORTING BUGS",
    "FEHLER MELDEN",
}
"""The same few sentences on every page."""

_BREAKS = {
    "PP",
    "P",
    "LP",
    "HP",
    "RS",
    "RE",
    "sp",
    "SY",
    "YS",
    "IP",
    "TP",
    "TQ",
    "br",
    "nf",
    "fi",
    "EX",
    "EE",
}
_ONE_FONT = {"B", "I", "SM", "SB", "R", "CW"}
_TWO_FONTS = {"BR", "IR", "RB", "RI", "BI", "IB"}
_LINKS = {"UR", "MT"}
_CLOSED_BLOCKS = {"TS": ".TE", "EQ": ".EN", "de": "..", "ig": ".."}

_SPECIAL = {
    "aq": "'", "dq": '"', "oq": "‘", "cq": "’", "lq": "“", "rq": "”", "Bq": "„", "Fo": "«", "Fc": "»",
    "ha": "^", "ti": "~", "ga": "`", "aa": "´", "rs": "\\", "sh": "#", "at": "@", "Do": "$", "lB": "[",
    "rB": "]", "lC": "{", "rC": "}", "or": "|", "ba": "|", "bv": "|", "br": "|", "sl": "/", "hy": "-",
    "mi": "−", "en": "–", "em": "—", "bu": "•", "co": "©", "rg": "®", "tm": "™", "sc": "§", "de": "°",
    "mu": "×", "di": "÷", "+-": "±", "pl": "+", "eq": "=", "<=": "≤", ">=": "≥", "!=": "≠", "->": "→",
    "<-": "←", "la": "⟨", "ra": "⟩", "12": "½", "14": "¼", "34": "¾", "if": "∞", "ss": "ß", "AE": "Æ",
    "ae": "æ", "/O": "Ø", "/o": "ø", "oA": "Å", "oa": "å", "Po": "£", "Eu": "€", "*m": "μ", "*p": "π",
    "S1": "¹", "S2": "²", "S3": "³",
    'L"': '"', 'R"': '"', "--": "—", "C+": "C++",  # strings that pod2man defines
}  # fmt: skip
_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303", ",": "\u0327"}
_ONE_CHARACTER = {
    "-": "-",
    "e": "\\",
    "\\": "\\",
    " ": " ",
    "~": " ",
    "0": " ",
    "t": "\t",
    "'": "´",
    "`": "`",
}

_NAME = r"(?:\((?P<{0}2>..)|\[(?P<{0}n>[^\]]*)\]|(?P<{0}1>[^(\[]))"
_ESCAPE = re.compile(
    r"\\(?:"
    r"[fFmMgknYV](?:\(..|\[[^\]]*\]|[+-]?.)"  # fonts, colours, registers: nothing of them is text
    r"|s(?:[+-]?\d|\([+-]?\d\d|[+-]?\[[^\]]*\]|[+-]?'[^']*')"  # sizes
    r"|[hvwlLxDbHSANXZoRB]'[^']*'"  # motions and drawings
    r"|(?P<string>\*)" + _NAME.format("s") + r"|(?P<special>[(\[](?:(?<=\()(?P<two>..)|(?<=\[)(?P<long>[^\]]*)\]))"
    r"|(?P<one>.)"
    r")"
)
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|\S)+)')
_COMMENT = re.compile(r"[.']\s*\\[\"#]")
_CONDITION = re.compile(r"[.']\s*(?:if|ie|el)\b")


def page_text(source: str) -> str:
    """The prose of a manual page.

    Args:
        source: the page as troff with `man` macros.

    Returns:
        Headings, paragraphs and literal blocks, a blank line between them; empty for a page that only refers
        to another (`.so`) or is written with the `mdoc` macros.
    """
    if re.search(r"^\.(?:so|Dd)\b", source, re.MULTILINE):
        return ""
    page = _Page()
    for line in _without_definitions(source):
        page.read(line)
    return page.text()


def plain(troff: str) -> str:
    r"""Text without escape sequences: `\fBread\fP(2)` is `read(2)`."""
    return _ESCAPE.sub(_character, troff)


def _character(match: re.Match[str]) -> str:
    if match["string"]:
        return _SPECIAL.get(match["s2"] or match["sn"] or match["s1"] or "", "")
    if match["special"]:
        return _special(match["two"] or match["long"] or "")
    return _ONE_CHARACTER.get(match["one"] or "", "")


def _special(name: str) -> str:
    r"""The character `\(xx` or `\[name]` stands for, empty if it is none that text needs."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    if code := re.fullmatch(r"u([0-9A-F]{4,6})|char(\d+)", name):
        return chr(int(code[1], 16) if code[1] else int(code[2]))
    if len(name) == 2 and name[0] in _ACCENTS:
        return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
    return ""


def _without_definitions(source: str) -> Iterator[str]:
    """Lines that may hold text: comments, conditions, macro definitions, tables and equations taken out."""
    closing, depth = None, 0
    for line in re.sub(r"(?<!\\)\\\n", "", source).split("\n"):
        if closing is not None:
            closing = None if line.startswith(closing) else closing
        elif depth or _CONDITION.match(line):
            depth = max(0, depth + line.count(r"\{") - line.count(r"\}"))
        elif _COMMENT.match(line):
            continue
        elif (request := line[1:3]) in _CLOSED_BLOCKS and line[0] == ".":
            closing = _CLOSED_BLOCKS[request]
        else:
            yield re.sub(r'(?<!\\)\\["#].*', "", line)


class _Page:
    """Collects the paragraphs of one page."""

    def __init__(self) -> None:
        self.paragraphs: list[str] = []
        self.words: list[str] = []
        self.tag = ""
        self.tag_follows = False
        self.literal = False
        self.unwanted = False
        self.link = ""

    def read(self, line: str) -> None:
        """Takes one line in."""
        if line[:1] not in (".", "'"):
            self._say(plain(line))
            return
        request, _, rest = line[1:].strip().partition(" ")
        arguments = [plain(quoted.replace('""', '"') or bare) for quoted, bare in _ARGUMENT.findall(rest)]
        if request in _ONE_FONT:
            self._say(" ".join(arguments))
        elif request in _TWO_FONTS:
            self._say("".join(arguments))
        elif request in ("SH", "SS"):
            self._heading(request, " ".join(arguments))
        elif request in _LINKS:
            self.link = "".join(arguments)
        elif request in ("UE", "ME"):
            self._say(f"<{self.link}>{''.join(arguments)}")
        elif request in _BREAKS:
            self._break(request, arguments)

    def text(self) -> str:
        """All paragraphs read so far."""
        self._flush()
        return "\n\n".join(self.paragraphs)

    def _say(self, words: str) -> None:
        if not self.literal and not words.strip():
            self._flush()
        elif self.tag_follows:
            self.tag, self.tag_follows = words, False
        else:
            self.words.append(words)

    def _heading(self, request: str, title: str) -> None:
        self._flush()
        self.literal = False
        if request == "SH":
            self.unwanted = title.upper() in _UNWANTED_SECTIONS
        self._say(title)
        self._flush()

    def _break(self, request: str, arguments: list[str]) -> None:
        self._flush()
        self.literal = request in ("nf", "EX") or (self.literal and request not in ("fi", "EE"))
        self.tag_follows = request in ("TP", "TQ")
        if request == "IP" and arguments:
            self.tag = arguments[0]

    def _flush(self) -> None:
        if self.literal:
            paragraph = "\n".join(line.rstrip() for line in self.words).strip("\n")
        else:
            paragraph = " ".join(" ".join(self.words).split())
        tag = self.tag.strip()
        # A bullet or a number stands before its paragraph, a name above it.
        paragraph = (" " if len(tag) <= 4 else "\n").join(filter(None, (tag, paragraph)))
        if paragraph and not self.unwanted:
            self.paragraphs.append(paragraph)
        self.words, self.tag = [], ""
