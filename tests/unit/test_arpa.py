"""ARPA files: a model survives them, and one that KenLM's `lmplz` made is the one made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from overhaul.arpa import from_arpa, to_arpa
from overhaul.errors import UserError
from overhaul.ngram import NGram, fit

TEXT = "the cat sat on the mat\nthe dog sat on the log\nthe cat saw the dog\na dog saw a cat\nthe cat sat"
LMPLZ = r"""\data\
ngram 1=12
ngram 2=21
ngram 3=21

\1-grams:
-1.159492 <unk> 0
0 <s> -0.39794
-0.7838284 </s> 0
-1.159492 the -0.30103
-1.1200016 cat -0.30103
-1.1200016 sat -0.30103
-0.97512823 on -0.30103
-0.97512823 mat -0.30103
-1.1200016 dog -0.30103
-0.97512823 log -0.30103
-1.1200016 saw -0.30103
-1.1200016 a -0.30103

\2-grams:
-0.6039441 cat </s> 0
-0.6039441 sat </s> 0
-0.2348897 mat </s> 0
-0.6039441 dog </s> 0
-0.2348897 log </s> 0
-0.2776083 <s> the -0.020203393
-0.27194506 on the -0.08715018
-0.5457162 saw the -0.08715018
-0.86034524 the cat -0.27547592
-0.540715 a cat -0.08715018
-0.6891041 cat sat -0.08715018
-0.6891041 dog sat -0.08715018
-0.41309735 sat on -0.41300377
-0.8154589 the mat -0.08715018
-0.6235531 the dog -0.08715018
-0.540715 a dog -0.08715018
-0.8154589 the log -0.08715018
-0.6891041 cat saw -0.08715018
-0.6891041 dog saw -0.08715018
-0.8849123 <s> a -0.08715018
-0.540715 saw a -0.08715018

\3-grams:
-0.4140002 a cat </s>
-0.53081286 cat sat </s>
-0.18163857 the mat </s>
-0.53081286 the dog </s>
-0.18163857 the log </s>
-0.08608089 sat on the
-0.3822671 cat saw the
-0.8805486 <s> the cat
-0.37945145 saw a cat
-0.2860154 the cat sat
-0.58786666 the dog sat
-0.39045182 cat sat on
-0.30288774 dog sat on
-0.6654506 on the mat
-0.56452465 <s> the dog
-0.42424983 saw the dog
-0.37945145 <s> a dog
-0.6654506 on the log
-0.7718471 the cat saw
-0.4569078 a dog saw
-0.37945145 dog saw a

\end\
"""
"""What `lmplz -o 3 --discount_fallback` of KenLM 0.3.0 writes for `TEXT`."""
SMALL = r"""\data\
ngram 1=5
ngram 2=2

\1-grams:
-1 <unk>
-99 <s> -0.5
-0.7 </s>
-0.6 a -0.25
-0.8 b

\2-grams:
-0.2 <s> a
-0.3 a b

\end\
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.arpa").write_text(SMALL)
    return tmp_path / "small.arpa"


def fitted() -> NGram:
    return fit([TEXT], order=3, enough_words=0)


def log_probs(model: NGram) -> dict[tuple[str, ...], tuple[float, float]]:
    """The lines of the file, by their words."""
    told, shorter, found = sorted(model.vocabulary, key=model.vocabulary.__getitem__), [()], {}
    for level in model.levels:
        contexts_G, last_G = np.divmod(level.keys_G, len(told))
        shorter = [(*shorter[c], told[w]) for c, w in zip(contexts_G, last_G, strict=True)]
        found |= dict(zip(shorter, zip(level.log_probs_G, level.backoffs_G, strict=True), strict=True))
    return found


def test_a_model_is_the_one_that_lmplz_makes(tmp_path: Path):
    (tmp_path / "lmplz.arpa").write_text(LMPLZ)
    theirs, ours = log_probs(from_arpa(tmp_path / "lmplz.arpa")), log_probs(fitted())

    assert set(ours) == set(theirs)
    for gram in set(ours) - {("<s>",)}:  # which is never predicted: 0 there, -99 here
        assert ours[gram] == pytest.approx(theirs[gram], abs=1e-5), gram


def test_a_model_that_was_written_and_read_gives_the_same_scores(tmp_path: Path):
    model = fitted()
    to_arpa(model, tmp_path / "model.arpa")

    back = from_arpa(tmp_path / "model.arpa")

    for text in (TEXT, "the dog sat on a zebra", "mat", "zebra\nzebra cat"):
        assert back.log_prob(text) == pytest.approx(model.log_prob(text), abs=1e-4)
        assert back.perplexity(text) == pytest.approx(model.perplexity(text), rel=1e-5)
    to_arpa(back, tmp_path / "again.arpa")
    assert (tmp_path / "again.arpa").read_bytes() == (tmp_path / "model.arpa").read_bytes()


def test_scores_are_those_of_the_backoff_form_done_by_hand(small: Path):
    model = from_arpa(small)

    assert model.log_prob("a b") == pytest.approx(-0.2 - 0.3 - 0.7)  # b has no backoff weight
    assert model.log_prob("a a") == pytest.approx(-0.2 - 0.25 - 0.6 - 0.25 - 0.7)
    assert model.log_prob("zebra b") == pytest.approx(-0.5 - 1 - 0.8 - 0.7)
    assert model.perplexity("a b") == pytest.approx(10 ** (1.2 / 3))


def test_a_model_cut_at_spaces_is_read_so(small: Path):
    model = from_arpa(small, words=str.split)

    assert model.log_prob("A b") == model.log_prob("zebra b")
    assert from_arpa(small).log_prob("A b") == from_arpa(small).log_prob("a b")


def test_an_order_without_ngrams_does_not_matter(small: Path):
    told = from_arpa(small).log_prob("a b a")

    empty = "\n\\3-grams:\n\n\\4-grams:\n\n\\end"
    small.write_text(SMALL.replace("ngram 2=2", "ngram 2=2\nngram 3=0\nngram 4=0").replace("\n\\end", empty))

    model = from_arpa(small)
    assert (model.order, model.log_prob("a b a")) == (4, told)


def test_a_file_without_unknown_words_gives_them_next_to_nothing(small: Path):
    small.write_text(SMALL.replace("-1 <unk>\n", "").replace("ngram 1=5", "ngram 1=4"))

    assert from_arpa(small).log_prob("zebra") == pytest.approx(-0.5 - 100 - 0.7)


def test_a_perplexity_above_all_numbers_is_infinite_and_no_warning(small: Path):
    small.write_text(SMALL.replace("-1 <unk>", "-900 <unk>"))

    assert from_arpa(small).perplexity("zebra zebra") == float("inf")


def test_tabs_empty_lines_and_other_line_ends_do_not_matter(small: Path):
    told = from_arpa(small).log_prob("a b a")

    small.write_bytes(("\n\n" + SMALL.replace(" a", "\ta").replace("\n", "\r\n\n")).encode())

    assert from_arpa(small).log_prob("a b a") == told


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\\data\\", "data", r"small.arpa:1: 'data' where \\data\\ was expected"),
        ("ngram 2=2", "ngram 3=2", ":3: ngram 3 where ngram 2"),
        ("ngram 1=5\nngram 2=2\n", "", "no count of n-grams"),
        ("ngram 2=2", "ngram 2=3", "1 columns in a line of 2-grams, of which 3"),
        ("ngram 2=2", "ngram 2=1", r"'-0.3 a b' where \\end\\ was expected"),
        ("\\2-grams:", "\\3-grams:", r"where \\2-grams: was expected"),
        ("-0.3 a b", "-0.3 a c", ":14: 'c' is no 1-gram"),
        ("-0.3 a b", "-0.3 <s> a", ":14: this 2-gram is there twice"),
        ("-0.8 b", "-0.8 a", ":10: 'a' is there twice"),
        ("-0.3 a b", "0.3 a b", "'0.3' is not log10 of a probability"),
        ("-0.3 a b", "nan a b", "'nan' is not log10 of a probability"),
        ("-0.3 a b", "x a b", ":14: 'x' and 'b' are not both numbers"),
        ("-0.6 a -0.25", "-0.6 a inf", "the backoff is not finite"),
        ("-0.7 </s>", "-0.7 c", "no </s> among the 1-grams"),
        ("\\end\\", "", "the file ends before"),
    ],
)
def test_what_is_no_whole_file_is_refused_with_its_line(small: Path, old: str, new: str, said: str):
    assert old in SMALL
    small.write_text(SMALL.replace(old, new))

    with pytest.raises(UserError, match=said):
        from_arpa(small)


def test_a_context_must_be_an_ngram_itself(tmp_path: Path):
    (tmp_path / "lmplz.arpa").write_text(LMPLZ.replace("-0.68910410 ", "").replace("cat sat -0.08", "mat sat -0.08"))

    with pytest.raises(UserError, match="the first 2 words of this 3-gram are no 2-gram"):
        from_arpa(tmp_path / "lmplz.arpa")


def test_what_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\xff\xfe")

    for path, said in (
        (tmp_path / "binary", "not a text"),
        (tmp_path / "none", "does not exist"),
        (tmp_path, "not a text"),
    ):
        with pytest.raises(UserError, match=said):
            from_arpa(path)


def test_nothing_is_overwritten(small: Path):
    with pytest.raises(UserError, match="is there already"):
        to_arpa(fitted(), small)

    assert small.read_text() == SMALL
    assert [file.name for file in small.parent.iterdir()] == ["small.arpa"]


def test_words_with_spaces_are_refused(tmp_path: Path):
    model = fit(["a b"], words=lambda line: [line], enough_words=0)

    with pytest.raises(UserError, match="'a b' has a space in it"):
        to_arpa(model, tmp_path / "model.arpa")
    assert not list(tmp_path.iterdir())
