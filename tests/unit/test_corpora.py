"""Named corpora and a user's own."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from overhaul import corpora
from overhaul.corpora import CorpusSpec, every_row, from_anywhere, named_corpora, open_corpus
from overhaul.documents import read_rows
from overhaul.errors import UserError

OFFLINE = [info.name for info in named_corpora() if not info.fetched]
FETCHED = [info.name for info in named_corpora() if info.fetched]
TEXTS = Path(corpora.__file__).parent / "texts"


def check(name: str) -> corpora.Corpus:
    corpus = open_corpus(name)
    info = next(info for info in named_corpora() if info.name == name)
    assert corpus.train
    assert corpus.calib
    assert corpus.heldout
    assert corpus.check_leakage() == []
    assert corpus.bytes == pytest.approx(info.bytes, rel=0.3)
    return corpus


@pytest.mark.parametrize("name", OFFLINE)
def test_corpora_that_are_always_there_do_not_leak(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FETCHED)
def test_fetched_corpora_do_not_leak_and_hold_no_markup(name):
    corpus = check(name)

    if name.startswith("manpages"):
        text = "\n".join(row["text"] for row in corpus.heldout)
        assert "\\fB" not in text
        assert "\n.SH" not in text


def test_the_sample_is_small_prose_with_room_for_the_demo():
    corpus = open_corpus("sample")

    assert corpus.bytes <= 300_000
    assert len(corpus.train) >= 12
    sizes = {part: sum(len(row["text"]) for row in getattr(corpus, part)) for part in ("train", "heldout")}
    assert sizes["train"] >= 100 * 512 * 4.2  # characters a token of English
    assert sizes["heldout"] >= 16 * 512 * 4.2
    assert {row["text"].count("\r") for row in corpus.train} == {0}


def test_the_sample_names_its_sources():
    told = (TEXTS / "README.md").read_text()

    for file in TEXTS.glob("*.txt"):
        assert file.stem.rstrip("0123456789") in told


def test_the_same_corpus_has_the_same_fingerprint_and_another_limit_another():
    whole = open_corpus("sample")

    assert open_corpus(CorpusSpec(path="sample")).fingerprint == whole.fingerprint
    assert open_corpus(CorpusSpec(path="sample", limit=20)).fingerprint != whole.fingerprint


def test_a_users_file_is_divided_and_what_was_met_is_noted(tmp_path):
    lines = (TEXTS / "moby-dick-001.txt").read_text().splitlines()
    (tmp_path / "book.txt").write_text("\n\n\n".join([*lines, lines[0]]))

    corpus = open_corpus(tmp_path / "book.txt")

    assert (corpus.name, corpus.licence, corpus.source) == (
        "book.txt",
        "not stated",
        str(tmp_path / "book.txt"),
    )
    assert corpus.check_leakage() == []
    assert "1 exact duplicates kept" in corpus.notes


def test_a_path_is_never_taken_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sample").mkdir()
    Path("sample/a.txt").write_text((TEXTS / "moby-dick-015.txt").read_text())

    for spec in (Path("sample"), "./sample"):
        assert open_corpus(spec).licence == "not stated"


def test_field_and_limit_reach_the_reader(tmp_path):
    rows = read_rows(TEXTS / "moby-dick-001.txt").rows[0]["text"].split("\n\n")
    (tmp_path / "a.csv").write_text("body\n" + "".join('"' + row.replace('"', "'") + '"\n' for row in rows))

    corpus = open_corpus(CorpusSpec(path=str(tmp_path / "a.csv"), field="body", limit=12))

    assert len(corpus.train) + len(corpus.calib) + len(corpus.heldout) == 12


def test_every_row_is_what_a_file_holds_and_all_parts_of_a_named_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\ntwo")
    sample = open_corpus("sample")

    assert [row["text"] for row in every_row(str(tmp_path / "a.txt"))] == ["one", "two"]
    assert list(every_row("sample")) == [*sample.train, *sample.calib, *sample.heldout]
    for name, says in (("nowhere", "neither a name nor"), (str(tmp_path / "empty.txt"), "is empty")):
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(UserError, match=says):
            list(every_row(name))


def test_an_unknown_name_gets_a_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match="did you mean 'sample'") as caught:
        open_corpus("smaple")

    assert "stdlib" in caught.value.allowed


def test_a_named_corpus_has_no_columns():
    with pytest.raises(UserError, match="named corpus"):
        open_corpus(CorpusSpec(path="sample", field="body"))


def test_a_spec_is_strict():
    with pytest.raises(ValidationError):
        CorpusSpec(path="sample", limit=0)
    with pytest.raises(ValidationError):
        CorpusSpec.model_validate({"path": "sample", "rows": 3})


def test_listing_the_corpora_imports_no_heavy_package():
    script = "import sys, overhaul.corpora as c; c.named_corpora(); print({'torch', 'pyarrow'} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


def test_a_corpus_is_called_so_that_it_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sample", "mine"):
        (tmp_path / name).mkdir()

    assert from_anywhere("sample") == "sample"  # the name wins, as when it is opened
    assert from_anywhere("./sample") == str(tmp_path / "sample")
    assert from_anywhere("mine") == str(tmp_path / "mine")
    assert from_anywhere("-") == "-"
