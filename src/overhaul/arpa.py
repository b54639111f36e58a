r"""N-gram models as ARPA files: those of KenLM, SRILM and others are read, and they read what is written here.

    \data\
    ngram 1=3
    \1-grams:
    -0.60206<tab>word<tab>-0.30103
    \end\

Each line holds log10 of a probability, the words, and log10 of the backoff weight where there is one.

Letters of shapes: G n-grams of one order, K words of each.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from overhaul import disk
from overhaul.errors import UserError
from overhaul.ngram import BEGIN, END, SPECIAL, UNKNOWN, Level, NGram, Words, words

UNKNOWN_LOG_PROB = -100.0
"""Of unknown words where a file has no `<unk>`: KenLM's."""

_OTHER_UNKNOWN = "<UNK>"
_BETWEEN = re.compile(r"[ \t]+")


def to_arpa(model: NGram, path: Path | str) -> None:
    """Writes a model; the file is there as a whole or not at all.

    Raises:
        UserError: something is there already, the disk refuses, or a word has a space in it.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} is there already", allowed="a file that is not there yet", hint="another name")
    spaced = next((word for word in model.vocabulary if re.search(r"[\0\s]", word)), None)
    if spaced is not None:
        raise UserError(f"the word {spaced!r} has a space in it", allowed="words without, as ARPA files have them")
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with disk.refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
                file.writelines(f"{line}\n" for line in _lines(model))
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)


def _lines(model: NGram) -> Iterator[str]:
    yield "\\data\\"
    yield from (f"ngram {k}={len(level.keys_G)}" for k, level in enumerate(model.levels, 1))
    told, shorter = sorted(model.vocabulary, key=model.vocabulary.__getitem__), [""]
    for k, level in enumerate(model.levels, 1):
        contexts_G, last_G = np.divmod(level.keys_G, len(told))
        grams = [f"{shorter[c]} {told[w]}".lstrip(" ") for c, w in zip(contexts_G, last_G, strict=True)]
        yield from ("", f"\\{k}-grams:")
        backoffs = [f"\t{left:.7g}" for left in level.backoffs_G] if k < model.order else [""] * len(grams)
        for log_prob, gram, backoff in zip(level.log_probs_G, grams, backoffs, strict=True):
            yield f"{log_prob:.7g}\t{gram}{backoff}"
        shorter = grams
    yield from ("", "\\end\\")


def from_arpa(path: Path | str, *, words: Words = words) -> NGram:
    """Reads a model.

    Args:
        path: a file in ARPA format.
        words: what makes words of a line, as the model's own text was cut; `str.split` where it was cut at spaces.

    Raises:
        UserError: there is no such file, or it is not a whole ARPA file.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            vocabulary, levels = _Reading(path, enumerate(file, 1)).model()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", allowed="an n-gram model in ARPA format") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(
            f"{path} is not a text file", allowed="an n-gram model in ARPA format; KenLM's binary files are not read"
        ) from error
    return NGram(vocabulary, levels, words)


class _Reading:
    """The lines of an ARPA file, with their numbers."""

    def __init__(self, path: Path, lines: Iterator[tuple[int, str]]) -> None:
        self.path, self.lines, self.number = path, lines, 0
        self.known = {word: number for number, word in enumerate(SPECIAL)}

    def wrong(self, what: str, number: int | None = None) -> UserError:
        """A mistake in a line, by itself the one that was read last."""
        place = f"{self.path}:{self.number if number is None else number}"
        return UserError(f"{place}: {what}", allowed="a whole ARPA file, as `lmplz --arpa` writes it")

    def line(self) -> str:
        """The next line that is not empty."""
        for number, line in self.lines:
            self.number = number
            if kept := line.strip(" \t\r\n"):
                return kept
        raise self.wrong("the file ends before \\end\\")

    def expect(self, wanted: str, found: str) -> None:
        """Refuses another line than the one that must stand here."""
        if found != wanted:
            raise self.wrong(f"{found[:40]!r} where {wanted} was expected")

    def model(self) -> tuple[dict[str, int], tuple[Level, ...]]:
        """The vocabulary and the n-grams of every order."""
        self.expect("\\data\\", self.line())
        counts: list[int] = []
        while told := re.fullmatch(r"ngram[ \t]+(\d+)[ \t]*=[ \t]*(\d+)", found := self.line()):
            if int(told[1]) != len(counts) + 1:
                raise self.wrong(f"ngram {told[1]} where ngram {len(counts) + 1} was expected")
            counts.append(int(told[2]))
        if not counts:
            raise self.wrong("no count of n-grams")
        levels: list[Level] = []
        for k, count in enumerate(counts, 1):
            self.expect(f"\\{k}-grams:", found)
            levels.append(self.longer(k, count, levels) if levels else self.unigrams(count))
            found = self.line()
        self.expect("\\end\\", found)
        return {word: number for word, number in self.known.items() if word != _OTHER_UNKNOWN}, tuple(levels)

    def unigrams(self, count: int) -> Level:
        """The first level; fills the vocabulary."""
        log_probs, backoffs = {UNKNOWN: UNKNOWN_LOG_PROB}, {}
        seen: set[int] = set()
        self.known[_OTHER_UNKNOWN] = UNKNOWN
        for _ in range(count):
            (word,), log_prob, backoff = self.columns(1, count)
            number = self.known.setdefault(word, len(self.known) - 1)
            if number in seen:
                raise self.wrong(f"{word!r} is there twice")
            seen.add(number)
            log_probs[number], backoffs[number] = log_prob, backoff
        if missing := [SPECIAL[number] for number in (BEGIN, END) if number not in seen]:
            raise self.wrong(f"no {' and no '.join(missing)} among the 1-grams")
        all_words = range(len(self.known) - 1)
        return Level(
            np.array(all_words),
            np.array([log_probs[number] for number in all_words]),
            np.array([backoffs.get(number, 0.0) for number in all_words]),
        )

    def longer(self, k: int, count: int, levels: list[Level]) -> Level:
        """The level of the k-grams, above those."""
        numbers, ids, values = [], [], []
        for _ in range(count):
            gram, log_prob, backoff = self.columns(k, count)
            try:
                ids += [self.known[word] for word in gram]
            except KeyError as error:
                raise self.wrong(f"{error.args[0]!r} is no 1-gram") from error
            numbers.append(self.number)
            values += [log_prob, backoff]
        size, ids_GK = len(levels[0].keys_G), np.array(ids, np.int64).reshape(-1, k)
        nodes_G = ids_GK[:, 0]
        for place, level in enumerate(levels[1:], 1):
            nodes_G = level.find(nodes_G * size + ids_GK[:, place])
        if (nodes_G < 0).any():
            number = numbers[int(nodes_G.argmin())]
            raise self.wrong(f"the first {k - 1} words of this {k}-gram are no {k - 1}-gram", number)
        keys_G = nodes_G * size + ids_GK[:, -1]
        order_G = np.argsort(keys_G, kind="stable")
        again = np.flatnonzero(np.diff(keys_G[order_G]) == 0)
        if len(again):
            raise self.wrong(f"this {k}-gram is there twice", numbers[order_G[again[0] + 1]])
        log_probs_G, backoffs_G = np.array(values, float).reshape(-1, 2)[order_G].T
        return Level(keys_G[order_G], log_probs_G, backoffs_G)

    def columns(self, k: int, count: int) -> tuple[list[str], float, float]:
        """The words of the next k-gram, and log10 of its probability and its backoff weight."""
        fields = _BETWEEN.split(self.line())
        if len(fields) not in (k + 1, k + 2):
            raise self.wrong(f"{len(fields)} columns in a line of {k}-grams, of which {count:,} were told")
        try:
            log_prob, backoff = float(fields[0]), float(fields[k + 1]) if len(fields) == k + 2 else 0.0
        except ValueError as error:
            raise self.wrong(f"{fields[0]!r} and {fields[-1]!r} are not both numbers") from error
        if not (log_prob <= 0 and math.isfinite(log_prob) and math.isfinite(backoff)):
            raise self.wrong(f"{fields[0]!r} is not log10 of a probability, or the backoff is not finite")
        return fields[1 : k + 1], log_prob, backoff
