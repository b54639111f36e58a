"""Questions with answers: the same for the same seed, none twice, none that is tested, each with its source."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from command import contents
from overhaul import artifact
from overhaul.corpora import open_corpus
from overhaul.documents import as_plain_text, read_rows
from overhaul.errors import UserError
from overhaul.question_writing import SHOWN, PageReader, Pages, QuestionWriting, items_of, write
from overhaul.questions import boolq, commonsenseqa, openbookqa

Row = dict[str, Any]


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def questions(path: Path) -> list[str]:
    return [row["question"] for row in rows(path)]


def plain(text: str) -> str:
    return " ".join(text.lower().split())


# By rule.


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path):
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write(QuestionWriting(count=300, heldout=30, seed=seed), tmp_path / name / "q.jsonl")
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))

    assert first == again
    assert first.keys() == {"q.jsonl", "q.heldout.jsonl", "q.json"}
    assert all(first[name] != other[name] for name in first)


def test_no_question_is_there_twice_nor_in_the_test_as_well(tmp_path: Path):
    write(QuestionWriting(count=2000, heldout=200, largest=20), tmp_path / "q.jsonl")
    train, test = questions(tmp_path / "q.jsonl"), questions(tmp_path / "q.heldout.jsonl")

    assert (len(train), len(test)) == (2000, 200)
    assert len({plain(text) for text in train + test}) == 2200
    runs = [{tuple(w[at : at + 8]) for t in texts for w in [re.findall(r"\w+", t.lower())] for at in range(len(w) - 7)}
            for texts in (train, test)]  # fmt: skip
    assert runs[1]
    assert runs[0].isdisjoint(runs[1])


def test_the_ledger_accounts_for_every_pair_that_was_made(tmp_path: Path):
    ledger = write(QuestionWriting(count=500, heldout=50, largest=12, kinds=("units",)), tmp_path / "q.jsonl")

    assert json.loads((tmp_path / "q.json").read_text()) == ledger
    kept = sum(file["pairs"] for file in ledger["files"].values())
    assert kept == 550
    assert ledger["made"] == kept + sum(ledger["dropped"].values()) + ledger["not needed"]
    assert ledger["dropped"]["duplicate"] > 0
    assert ledger["settings"]["largest"] == 12
    assert {row["generator"]["sha256"] for row in rows(tmp_path / "q.jsonl")} == {ledger["generator"]["sha256"]}
    assert {(row["kind"], row["seed"]) for row in rows(tmp_path / "q.jsonl")} == {("units", 0)}


def test_rows_are_read_as_questions_with_answers_and_as_plain_documents(tmp_path: Path):
    write(QuestionWriting(count=5), tmp_path / "q.jsonl")

    (first, *_), (told, *_) = read_rows(tmp_path / "q.jsonl").rows, rows(tmp_path / "q.jsonl")
    assert dict(first) == {"question": told["question"], "answer": told["answer"]}
    assert as_plain_text(first)["text"] == f"{told['question']}\n{told['answer']}"


def test_what_a_test_asks_is_dropped_also_where_only_a_run_of_words_is_the_same(tmp_path: Path):
    choice = QuestionWriting(count=400)
    write(choice, tmp_path / "all.jsonl")
    found = questions(tmp_path / "all.jsonl")
    long = next(text for text in found[100:] if len(text.split()) > 10)
    short = next(text for text in found[100:] if len(text.split()) < 8)
    planted = [{"question": f"Now then: {' '.join(long.split()[1:10])}", "answer": "?"}, {"text": short.upper()}]
    (tmp_path / "a.jsonl").write_text(json.dumps(planted[0]))
    (tmp_path / "b.jsonl").write_text(json.dumps(planted[1]))

    against = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    ledger = write(choice.model_copy(update={"against": against}), tmp_path / "clean.jsonl")

    clean = questions(tmp_path / "clean.jsonl")
    assert {long, short} <= set(found)
    assert {long, short}.isdisjoint(clean)
    assert ledger["dropped"]["in a test"] >= 2
    assert set(found) - set(clean) >= {long, short}
    assert [ledger["against"][name]["items"] for name in against] == [1, 1]


def test_the_items_of_a_file_and_of_a_corpus(tmp_path: Path):
    shapes = [
        {"question": "Is it?", "answer": "It is."},
        {"prompt": "It is", "completion": " so"},
        {"text": "It was."},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
    ]
    (tmp_path / "shapes.jsonl").write_text("\n".join(map(json.dumps, shapes)))
    sample = open_corpus("sample")

    assert items_of(str(tmp_path / "shapes.jsonl")) == ["Is it?", "It is", "It was.", "Why?"]
    assert len(items_of("sample")) == len(sample.train) + len(sample.calib) + len(sample.heldout)
    with pytest.raises(UserError, match="neither a name nor an existing path"):
        items_of("nowhere.jsonl")


def test_a_test_with_other_columns_is_refused_without_a_flag_that_does_not_help(tmp_path: Path):
    (tmp_path / "other.jsonl").write_text('{"body": "It was."}')

    with pytest.raises(UserError, match=r"--against .*other.jsonl.* columns found: body") as error:
        items_of(str(tmp_path / "other.jsonl"))
    assert "--field" not in str(error.value)
    with pytest.raises(UserError, match="neither a name"):
        items_of(str(tmp_path / "nowhere.jsonl"))


def test_the_items_of_a_task_are_its_questions_alone(monkeypatch: pytest.MonkeyPatch):
    made = [
        boolq(
            {"title": "Brest", "passage": "A port.\nQuestion: none.", "question": "is brest a port", "answer": "True"}
        ),
        commonsenseqa({"question": "Where is a port?", "options": "\nA. sea\nB. hill", "answer": "A. sea"}),
        openbookqa({"question": "A port is", "options": "\nA. wet\nB. dry", "answer": "A. wet"}),
    ]
    monkeypatch.setattr("overhaul.question_writing.questions", lambda _: made)

    assert items_of("boolq") == ["is brest a port?", "Where is a port?", "A port is"]


def test_a_definition_names_the_page_that_holds_it(tmp_path: Path, pages: Path):
    ledger = write(QuestionWriting(kinds=("definitions",), seeds=str(pages), count=20, heldout=5), tmp_path / "q.jsonl")
    train = open_corpus(pages).train

    for row in rows(tmp_path / "q.jsonl") + rows(tmp_path / "q.heldout.jsonl"):
        page = train[row["source"]["row"]]
        assert page.id == row["source"]["page"]
        assert row["answer"] in page["text"]
        assert row["source"]["corpus"] == ledger["seeds"]["corpus"] == "pages.jsonl"
    assert ledger["seeds"]["fingerprint"] == open_corpus(pages).fingerprint


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Sixty pages, each with a definition."""
    path = tmp_path / "pages.jsonl"
    texts = [f"In the port of Brest {n} ships lay. Sloop-{n} is a ship of the {n}th class there. It sank in {1700 + n}."
             for n in range(60)]  # fmt: skip
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


# By a model. What it writes is given here, so that what becomes of it is known.

Script = Callable[[str], str]


@pytest.fixture
def scripted(tiny: Path, pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Row]:
    """`scripted(script, **settings)` -> the ledger where the model goes on as the script does."""

    def run(script: Script, **settings: Any) -> Row:
        def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], **how: Any) -> list[str]:
            return [script(prompt) for prompt in prompts]

        monkeypatch.setattr("overhaul.generation.continuations", continuations)
        small = {"count": 20, "tokens": 8, "page_words": 12, "generator": str(tiny), "seeds": str(pages)}
        return write(QuestionWriting(**(small | settings)), tmp_path / "q.jsonl")

    return run


def piece_in(prompt: str) -> str:
    """What was shown of the last page."""
    return prompt.rpartition("Text: ")[2].split("\nQuestion:")[0]


def about_its_piece(prompt: str) -> str:
    """A question with the first words of what was shown, or an answer with the last."""
    piece = piece_in(prompt).split()
    return f" What stands behind {' '.join(piece[:4])}?" if prompt.endswith("Question:") else f" {' '.join(piece[-3:])}"


def test_a_pair_of_a_model_names_the_words_of_the_page_it_was_written_from(
    scripted: Callable[..., Row], tmp_path: Path, pages: Path, tiny: Path
):
    ledger = scripted(about_its_piece)
    train = open_corpus(pages).train

    found = rows(tmp_path / "q.jsonl")
    assert len(found) == 20
    for row in found:
        page = train[row["source"]["row"]]
        start, end = row["source"]["words"]
        shown = page["text"].split()[start:end]
        assert page.id == row["source"]["page"]
        assert row["question"] == f"What stands behind {' '.join(shown[:4])}?"
        assert row["answer"] == " ".join(shown[-3:])
        assert len(shown) <= 12
    assert ledger["generator"] == {"name": str(tiny), "sha256": artifact.weights_sha256(tiny)}
    assert {row["kind"] for row in found} == {"page"}


def test_examples_stand_before_the_page(scripted: Callable[..., Row], tmp_path: Path):
    own = {"text": "It rains.", "question": "How is the weather?", "answer": "Wet."}
    (tmp_path / "own.jsonl").write_text(json.dumps(own))
    asked: list[str] = []

    def script(prompt: str) -> str:
        asked.append(prompt)
        return about_its_piece(prompt)

    scripted(script, examples=str(tmp_path / "own.jsonl"))

    assert asked[0].startswith("Text: It rains.\nQuestion: How is the weather?\nAnswer: Wet.\n\nText: ")
    assert not any(text in asked[0] for text, _, _ in SHOWN)


def test_only_answers_that_the_model_gives_again_are_kept(scripted: Callable[..., Row], tmp_path: Path):
    def script(prompt: str) -> str:
        if prompt.endswith("Question:"):
            return about_its_piece(prompt)
        asked = prompt.rpartition("Question: ")[2]
        is_known = any(int(number) % 2 for number in re.findall(r"Brest (\d+)", asked))
        return " the same" if "Text: " in prompt or is_known else " no idea"

    ledger = scripted(script, agree=3, count=10)

    assert ledger["dropped"]["not agreed"] > 0
    for row in rows(tmp_path / "q.jsonl"):
        (number,) = re.findall(r"Brest (\d+)", row["question"])
        assert int(number) % 2


def test_an_answer_from_elsewhere_is_dropped(scripted: Callable[..., Row], tmp_path: Path):
    def script(prompt: str) -> str:
        written = about_its_piece(prompt)
        return " a whale of a time" if not prompt.endswith("Question:") and len(written) % 2 else written

    ledger = scripted(script, overlap=0.9)

    assert ledger["dropped"]["not from the page"] > 0
    assert not any("whale" in row["answer"] for row in rows(tmp_path / "q.jsonl"))


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (lambda _: "", "32 empty or unfinished"),
        (lambda _: "no question", "32 not a question"),
        (lambda prompt: "What is a ship there?" if prompt.endswith("Question:") else "a hull", "31 duplicate"),
        (lambda prompt: SHOWN[0][1] if prompt.endswith("Question:") else "at 9 degrees", "32 duplicate"),
    ],
    ids=["empty", "no question", "the same", "an example"],
)
def test_a_model_that_writes_nothing_of_use_is_an_error_with_the_counts(
    script: Script, why: str, scripted: Callable[..., Row], tmp_path: Path
):
    with pytest.raises(UserError, match=f"too little that is of use: of 32, {why}") as refused:
        scripted(script)

    assert "at most 90% dropped" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pages.jsonl"]


def test_the_same_seed_has_the_model_write_the_same(tiny: Path, pages: Path, monkeypatch: pytest.MonkeyPatch):
    def first_round(seed: int) -> list[Any]:
        choice = QuestionWriting(generator=str(tiny), seeds=str(pages), tokens=8, page_words=8, seed=seed)
        return next(PageReader(choice, Pages.of(choice)).rounds())

    first, again, other = (first_round(seed) for seed in (0, 0, 1))

    assert first == again
    assert [pair.source for pair in first] != [pair.source for pair in other]


def test_each_answer_that_is_compared_is_drawn_anew(
    tiny: Path, pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seeds: list[int] = []

    def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int, **how: Any) -> list[str]:
        seeds.append(seed)
        return [about_its_piece(prompt) if "Text: " in prompt else " the same" for prompt in prompts]

    monkeypatch.setattr("overhaul.generation.continuations", continuations)
    choice = QuestionWriting(generator=str(tiny), seeds=str(pages), tokens=8, page_words=12, agree=2)
    reader = PageReader(choice, Pages.of(choice))
    for made in islice(reader.rounds(), 3):
        reader.confirmed(made)

    assert len(seeds) == 3 * (2 + 2)
    assert len(set(seeds)) == len(seeds)


def test_of_a_page_without_spaces_a_part_is_shown_that_fits(tiny: Path, tmp_path: Path):
    text = "".join(f"{n}灯塔是一座塔" for n in range(600))
    (tmp_path / "page.jsonl").write_text("\n".join(json.dumps({"text": text + str(n)}) for n in range(8)))
    choice = QuestionWriting(generator=str(tiny), seeds=str(tmp_path / "page.jsonl"), tokens=8)
    reader = PageReader(choice, Pages.of(choice))

    pairs = next(reader.rounds())

    assert {len(pair.text) > 0 and pair.text in text for pair in pairs} == {True}
    room = artifact.load(tiny).model.config.max_position_embeddings - 2 * 8
    lengths = [len(reader._tokenizer(reader._asked(pair.text, random.Random(0)))["input_ids"]) for pair in pairs]
    assert 0.5 * room < min(lengths) <= max(lengths) <= room + 2
    assert len({pair.text for pair in pairs}) > 1


# Mistakes.


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"agree": 2}, "does not read --agree"),
        ({"generator": "smollm2-135m"}, "a model writes about pages, and there are none"),
        ({"generator": "smollm2-135m", "seeds": "sample", "largest": 50}, "does not read --largest"),
        ({"generator": "smollm2-135m", "seeds": "sample", "agree_share": 0.7}, "--agree-share is of --agree"),
        ({"kinds": ("definitions",)}, "--kinds definitions writes about pages"),
        ({"seeds": "sample"}, "nothing reads --seeds sample"),
        ({"field": "body"}, "--field body is of --seeds"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], says: str, tmp_path: Path):
    with pytest.raises(UserError, match=says):
        write(QuestionWriting(**settings), tmp_path / "q.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["q.jsonl", "q.json", "q.heldout.jsonl"])
def test_nothing_that_exists_is_written_over(there: str, tmp_path: Path):
    (tmp_path / there).write_text("mine")

    with pytest.raises(UserError, match=f"{there} exists"):
        write(QuestionWriting(count=5, heldout=5), tmp_path / "q.jsonl")
    assert contents(tmp_path).keys() == {there}
    assert (tmp_path / there).read_text() == "mine"


def test_more_than_there_is_to_ask_is_an_error(tmp_path: Path, pages: Path):
    with pytest.raises(UserError, match=r"templates has no more: .* pairs of the 1000"):
        write(QuestionWriting(kinds=("definitions",), seeds=str(pages)), tmp_path / "q.jsonl")


def test_a_space_that_is_too_small_ends_with_the_counts(tmp_path: Path):
    with pytest.raises(UserError, match=r"too little that is of use: .* duplicate"):
        write(QuestionWriting(kinds=("units",), largest=10, count=100_000, most_dropped=0.5), tmp_path / "q.jsonl")


def test_a_model_that_reads_too_little_is_refused(tiny: Path, tmp_path: Path):
    with pytest.raises(UserError, match="reads 512 tokens, and the examples with a new pair"):
        write(QuestionWriting(generator=str(tiny), seeds="sample", tokens=200), tmp_path / "q.jsonl")


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is not a name of JSON lines"):
        write(QuestionWriting(), tmp_path / "q.json")
