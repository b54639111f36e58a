"""Rows from every supported format, and what is said about those that cannot be read."""

import csv
import io
import json
import random
import re
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from overhaul.documents import (
    Message,
    Reading,
    Row,
    as_plain_text,
    json_line,
    labelled_row,
    read_columns,
    read_rows,
    row_text,
    text_row,
)
from overhaul.errors import UserError
from overhaul.records import PIECE_BYTES, NotUtf8Error

RECORDS = [{"text": "first", "source": 1}, {"text": "second", "source": 2}]


def json_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def texts(path: Path | str, **options) -> list[str]:
    return [row["text"] for row in read_rows(path, **options).rows]


def test_a_text_file_is_cut_where_two_blank_lines_stand(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nstill one\n\n\ntwo\n \n\n\nthree\n")

    assert texts(tmp_path / "a.txt") == ["one\n\nstill one", "two", "three"]


def test_every_table_format_gives_the_same_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text(json_lines(RECORDS))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(json_lines(RECORDS).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "source"])
        writer.writeheader()
        writer.writerows(RECORDS)

    for name in ("a.jsonl", "a.jsonl.zst", "a.parquet", "a.csv"):
        assert texts(tmp_path / name) == ["first", "second"], name


def test_a_compressed_file_may_have_several_frames_but_not_half_a_one(tmp_path):
    first, second = (zstandard.compress(json_lines([record]).encode()) for record in RECORDS)
    (tmp_path / "a.jsonl.zst").write_bytes(first + second)
    (tmp_path / "cut.jsonl.zst").write_bytes(first + second[:-5])

    assert texts(tmp_path / "a.jsonl.zst") == ["first", "second"]
    with pytest.raises(UserError, match="ends too early"):
        read_rows(tmp_path / "cut.jsonl.zst")


def test_a_saved_dataset_and_a_dictionary_of_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "one")
    DatasetDict({name: Dataset.from_list(RECORDS) for name in ("train", "test")}).save_to_disk(tmp_path / "two")

    assert texts(tmp_path / "one") == ["first", "second"]
    assert texts(tmp_path / "two") == ["first", "second"] * 2


def test_a_directory_is_read_sorted_one_document_a_file_and_the_rest_is_counted(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/c.md").write_text("# c\n\n\n\nstill c")
    (tmp_path / "b.py").write_text("b = 1\n")
    (tmp_path / "a.jsonl").write_text(json_lines(RECORDS))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("not read")

    found = read_rows(tmp_path)

    assert [row["text"] for row in found.rows] == ["first", "second", "b = 1", "# c\n\n\n\nstill c"]
    assert (found.notes.undecodable, found.notes.unsupported) == (1, 1)


@pytest.mark.parametrize(
    ("piped", "expected"),
    [(json_lines(RECORDS), ["first", "second"]), ("plain\ntext", ["plain\ntext"])],
    ids=["json lines", "text"],
)
def test_standard_input(monkeypatch, piped, expected):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(piped.encode())))

    assert texts("-") == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "t"}, [("t", True)]),
        ({"prompt": "p", "completion": "c"}, [("p", False), ("c", True)]),
        ({"question": "q", "answer": "a"}, [("q\n", False), ("a", True)]),
        ({"prompt": "p", "chosen": "good", "rejected": "bad"}, [("p", False), ("good", True)]),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            [("u", False), ("a", True)],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_each_shape_trains_on_its_answer(tmp_path, record, expected):
    (tmp_path / "a.jsonl").write_text(json_lines([record]))

    (row,) = read_rows(tmp_path / "a.jsonl").rows

    assert row_text(row) == expected


def test_a_row_is_a_frozen_mapping_with_a_stable_id():
    row = Row((("messages", (Message("user", "hi"),)),))

    assert dict(row) == {"messages": (Message("user", "hi"),)}
    assert text_row("a").id == text_row("a").id != text_row("b").id
    assert text_row("a").id == "0798f1ceea91e418"
    assert as_plain_text(row).document == row.id != as_plain_text(row).id
    assert text_row("a", cut_of=row.id) == text_row("a")
    assert text_row("a").document == as_plain_text(text_row("a")).document == text_row("a").id
    with pytest.raises(AttributeError):
        row.columns = ()  # pyright: ignore[reportAttributeAccessIssue]


def test_field_wins_over_the_shapes_and_limit_stops_early(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines([{"text": "no", "body": f"row {i}"} for i in range(5)]))

    assert texts(tmp_path / "a.jsonl", field="body", limit=2) == ["row 0", "row 1"]


def test_empty_and_undecodable_rows_are_dropped_and_counted_duplicates_only_counted(tmp_path):
    lines = [b'{"text": "a"}', b'{"text": " "}', b'{"text": null}', b'{"text": "caf\xe9"}', b'{"text": "a"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))

    found = read_rows(tmp_path / "a.jsonl")

    assert [row["text"] for row in found.rows] == ["a", "a"]
    assert found.notes.sentences() == (
        "2 empty rows dropped",
        "1 rows or files that are not UTF-8 dropped",
        "1 exact duplicates kept",
    )


def test_not_utf8_names_the_file_and_the_first_bad_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("un café".encode("latin1"))

    with pytest.raises(NotUtf8Error, match=r"a\.txt is not UTF-8: byte 0xe9 at offset 6"):
        read_rows(tmp_path / "a.txt")


def test_the_first_bad_byte_of_a_table_is_found_wherever_the_pieces_are_cut(tmp_path):
    for length in range(PIECE_BYTES - 3, PIECE_BYTES + 2):
        text = "text\n" + "x" * (length - 5)
        (tmp_path / "good.csv").write_text(text + "é\n")
        (tmp_path / "bad.csv").write_bytes(text.encode() + "é".encode()[:1] + b"\n")

        assert texts(tmp_path / "good.csv") == ["x" * (length - 5) + "é"]
        with pytest.raises(NotUtf8Error, match=rf"byte 0xc3 at offset {length:,}\n"):
            read_rows(tmp_path / "bad.csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".csv"])
def test_a_table_is_read_piece_by_piece(suffix: str, tmp_path: Path):
    file, draw = tmp_path / f"a{suffix}", random.Random(0)
    rows = [draw.randbytes(500).hex() for _ in range(20_000)]
    if suffix == ".csv":
        file.write_text("text\n" + "\n".join(rows))
    else:
        lines = json_lines([{"text": text} for text in rows]).encode()
        file.write_bytes(lines if suffix == ".jsonl" else zstandard.compress(lines))
    tracemalloc.start()

    count = sum(1 for _ in Reading(file))

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2e6  # of 20 MB of text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "  \n\n", "is empty"),
        ("a.docx", "x", "unknown suffix '.docx'"),
        ("a.jsonl", '{"body": "x", "id": 3}\n', "columns found: body, id"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", '["x"]\n', "a.jsonl:1 is a JSON list"),
        ("a.jsonl", '{"text": ["x"]}\n', "column 'text' holds list"),
        ("a.jsonl", '{"messages": ["x"]}\n', "messages = "),
        ("a.jsonl.zst", "not compressed", "cannot be decompressed"),
        ("a.parquet", "not a table", "is not a Parquet file"),
    ],
)
def test_what_cannot_be_read_is_a_user_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)

    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_a_wrong_column_tells_what_would_do(tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,x\n")

    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / "a.csv", field="txt")

    assert "no column 'txt'; columns found: id, body" in caught.value.given
    assert "prompt+completion" in caught.value.allowed
    assert caught.value.hint.startswith("--field ")


def test_a_missing_path_and_an_empty_directory(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty"):
        read_rows(tmp_path)


def test_columns_are_read_in_the_order_they_are_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n", "topic": "x", "n": 1}\n\n{"topic": "y", "text": "two"}\n')
    (tmp_path / "a.csv").write_text("topic,text\nx,one\ny,two\n")

    for name in ("a.jsonl", "a.csv"):
        assert read_columns(tmp_path / name, ("topic", "text")) == [("x", "one"), ("y", "two")]


@pytest.mark.parametrize("text", ["Bücher", "half \ud83d of a pair", '"quoted"\nand broken'])
def test_a_line_of_json_is_read_as_it_was_written(text, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_line({"text": text}) * 2, "utf-8")

    assert texts(tmp_path / "a.jsonl") == [text, text]
    assert ("Bücher" in (tmp_path / "a.jsonl").read_text("utf-8")) == (text == "Bücher")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ('{"text": "one"}', "a.jsonl:1 has no topic; its columns: text"),
        ('{"text": "one", "topic": " "}', "has no topic"),
        ('{"text": "one", "topic": 3}', "holds int, not text"),
        ('{"text": "one", "topic": "x"}\n[]', "a.jsonl:2 is a JSON list"),
    ],
)
def test_columns_that_are_not_there_are_named(content, says, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)

    with pytest.raises(UserError, match=says):
        read_columns(tmp_path / "a.jsonl", ("text", "topic"))


def test_columns_of_what_is_no_table_are_refused(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe4", "topic": "x"}')

    with pytest.raises(NotUtf8Error, match="0xe4"):
        read_columns(tmp_path / "latin.jsonl", ("text", "topic"))
    with pytest.raises(UserError, match="is no file"):
        read_columns(tmp_path, ("text",))


def test_a_label_is_content_of_which_nothing_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"about": "one", "section": 3}\n{"about": " ", "section": "x"}\n{"about": "one", "section": " x "}\n'
    )
    found = read_rows(tmp_path / "a.jsonl", "about", label="section")

    assert [dict(row) for row in found.rows] == [{"text": "one", "label": "3"}, {"text": "one", "label": "x"}]
    assert found.notes.empty == 1
    assert row_text(found.rows[0]) == [("one", True)]
    assert len({row.id for row in found.rows}) == 2
    assert found.rows[0] == labelled_row("one", "3") != text_row("one")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "one"}', r"a.jsonl:1 has no column 'label'; its columns: text.*--label-field COLUMN"),
        ('{"texts": "one", "label": 1}', r"no column 'text'; its columns: texts, label.*did you mean 'texts'"),
        ('{"text": "one", "label": 1}\n{"text": "two", "label": " "}', r"a.jsonl:2 has no label in column 'label'"),
        ('{"text": "one", "label": [1]}', r"the label is a list.*a name or a number"),
    ],
)
def test_labels_that_are_not_there_are_refused(content, says, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)

    with pytest.raises(UserError, match=re.compile(says, re.DOTALL)):
        read_rows(tmp_path / "a.jsonl", label="label")
