"""Labelled texts: what is read, what is left out and said, what is refused, and that nothing is in both parts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from overhaul.errors import UserError
from overhaul.labelled_texts import LabelledTexts, TextSet, open_classes, open_labelled
from overhaul.tasks import tasks_of_texts


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def rows(label: Any, count: int = 10, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text {number} of {label}", "label": label} for number in range(start, start + count)]


def by_class(found: TextSet, part: LabelledTexts) -> dict[str, list[str]]:
    told: dict[str, list[str]] = {name: [] for name in found.classes}
    for text, label in zip(part.texts, part.labels_N, strict=True):
        told[found.classes[label]].append(text)
    return told


def test_a_fifth_of_each_class_is_held_out_whatever_the_order(tmp_path: Path):
    some = [*rows("b", 20), *rows("a", 10)]
    found = open_labelled(written(tmp_path / "one.jsonl", some), label="label")
    turned = open_labelled(written(tmp_path / "two.jsonl", some[::-1]), label="label")

    assert found.classes == ("a", "b")
    assert {name: len(texts) for name, texts in by_class(found, found.heldout).items()} == {"a": 2, "b": 4}
    assert set(found.heldout.texts) == set(turned.heldout.texts)
    assert set(found.heldout.texts) | set(found.train.texts) == {row["text"] for row in some}
    assert not found.notes


def test_every_table_reads_alike(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    some = [{"said": row["text"], "topic": row["label"]} for row in [*rows("x"), *rows("y")]]
    lines = written(tmp_path / "t.jsonl", some)
    with (tmp_path / "t.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["said", "topic"])
        table.writeheader()
        table.writerows(some)
    pq.write_table(pa.Table.from_pylist(some), tmp_path / "t.parquet")

    found = [open_labelled(str(tmp_path / f"t.{kind}"), label="topic", text="said") for kind in ("csv", "parquet")]

    expected = open_labelled(lines, label="topic", text="said")
    assert {one.fingerprint for one in found} == {expected.fingerprint}


def test_what_cannot_be_used_is_left_out_and_said(tmp_path: Path):
    some = [
        *rows("a"), *rows("b"), *rows("alone", 1), *rows("again", 1), *rows("again", 1),
        {"text": "no label"}, {"text": "empty label", "label": " "}, {"text": "null", "label": None},
        {"label": "a"}, {"text": "  ", "label": "a"}, {"text": 7, "label": "b"},
    ]  # fmt: skip
    found = open_labelled(written(tmp_path / "t.jsonl", some), label="label")

    assert found.classes == ("a", "b")
    assert "3 rows without a label left out" in found.notes
    assert "3 rows without text left out" in found.notes
    assert "classes with one text, or one again and again, left out: again, alone" in found.notes


def test_labels_of_several_types_are_one_name_and_said(tmp_path: Path):
    some = [*rows(1, 5), *rows("1", 5, start=5), *rows(10), *rows(9), *rows("zebra")]
    found = open_labelled(written(tmp_path / "t.jsonl", some), label="label")

    assert found.classes == ("1", "9", "10", "zebra"), "numbers by their size, before names"
    assert "labels of several types are read as text: 25 int, 15 str" in found.notes


def test_no_text_is_in_both_parts_and_one_of_two_classes_is_trained_on(tmp_path: Path):
    twice = [{"text": f"both {number}", "label": label} for number in range(5) for label in "ab"]
    some = [*rows("a"), *rows("a"), *rows("b"), *twice]
    found = open_labelled(written(tmp_path / "t.jsonl", some), label="label")

    assert not set(found.train.texts) & set(found.heldout.texts)
    assert not [text for text in found.heldout.texts if text.startswith("both")]
    assert "10 texts that occur under several labels are trained on, never held out" in found.notes


def test_as_many_of_a_class_as_are_asked_for(tmp_path: Path):
    path = written(tmp_path / "t.jsonl", [*rows("a", 50), *rows("b", 30)])
    found = open_labelled(path, label="label", limit=12, heldout=3)

    assert {len(texts) for texts in by_class(found, found.train).values()} == {12}
    assert {len(texts) for texts in by_class(found, found.heldout).values()} == {3}
    assert set(found.train.texts) < set(open_labelled(path, label="label").train.texts)


def test_a_corpus_is_a_class_cut_into_pieces_with_what_is_between_words(tmp_path: Path):
    (tmp_path / "code.txt").write_text("\n\n\n".join(f"def f_{n}(x):\n    return  x + {n}" for n in range(4000)))
    found, _ = open_classes([str(tmp_path / "code.txt"), "sample"], words=3)

    assert found.classes == ("code.txt",)
    pieces = {*found.train.texts, *found.heldout.texts}
    assert "def f_7(x):\n    return" in pieces
    assert not set(found.train.texts) & set(found.heldout.texts)


def test_sets_are_tasks_and_their_classes_are_divided_together(tmp_path: Path):
    paths = [written(tmp_path / f"{name}.jsonl", [*rows(f"{name}1"), *rows(f"{name}2")]) for name in "qp"]
    sets = [open_labelled(path, label="label") for path in paths]

    apart = tasks_of_texts(sets, name="both")
    assert [task.name for task in apart.tasks] == ["q.jsonl", "p.jsonl"]
    assert apart.classes == ("q1", "q2", "p1", "p2")
    assert [task.classes for task in apart.tasks] == [(0, 1), (2, 3)]
    assert tasks_of_texts(sets, name="both", split=4).tasks[3].name == "p2"
    mixed = tasks_of_texts(sets, name="both", order=1)
    for task in mixed.tasks:
        for text, label in zip(task.train.texts, task.train.labels_N, strict=True):  # pyright: ignore[reportAttributeAccessIssue]
            assert text.endswith(mixed.classes[label])
    assert len(apart.validating(0.5).tasks[0].heldout) == 8


def test_what_is_held_out_in_one_set_and_trained_on_in_another_is_said(tmp_path: Path):
    one = open_labelled(written(tmp_path / "a.jsonl", [*rows("a"), *rows("b")]), label="label")
    held = [{"text": text, "label": "c"} for text in one.heldout.texts]
    other = open_labelled(written(tmp_path / "c.jsonl", [*held, *rows("c"), *rows("d")]), label="label")

    assert any("are trained on in another task, under another label" in n for n in
               tasks_of_texts([one, other], name="both").notes)  # fmt: skip


def test_bad_input_is_one_clear_error(tmp_path: Path):
    def refused(some: list[dict[str, Any]], words: str, **how: Any) -> None:
        path = written(tmp_path / "bad.jsonl", some)
        with pytest.raises(UserError, match=f"(?s){words}"):
            open_labelled(path, **{"label": "label", **how})

    refused(rows("a"), "has no column 'lable'.*did you mean 'label'", label="lable")
    refused(rows("a"), "has no column 'said'.*--text-field", text="said")
    refused([], "has no column 'label'")
    refused([{"text": "", "label": "a"}], "has no row with a text and a label")
    refused([{"text": "a", "label": ["x"]}], "bad.jsonl:1: the label is a list")
    refused(rows("a", 1), "has no class with two different texts")
    refused([*rows("a", 2), *[{**row, "label": "b"} for row in rows("a", 2)], *rows("b")],
            "nothing of class a can be held out")  # fmt: skip
    with pytest.raises(UserError, match="does not exist"):
        open_labelled(str(tmp_path / "nowhere.jsonl"), label="label")
    (tmp_path / "short.txt").write_text("one two")
    with pytest.raises(UserError):
        open_classes([str(tmp_path / "short.txt")], words=8)

    one = open_labelled(written(tmp_path / "one.jsonl", [*rows("a"), *rows("b")]), label="label")
    other = open_labelled(written(tmp_path / "other.jsonl", [*rows("b"), *rows("c")]), label="label")
    with pytest.raises(UserError, match=r"class b is in one\.jsonl and in other\.jsonl"):
        tasks_of_texts([one, other], name="both")
    alone = open_labelled(written(tmp_path / "alone.jsonl", rows("a")), label="label")
    with pytest.raises(UserError, match="has the class a alone"):
        tasks_of_texts([alone], name="alone")
