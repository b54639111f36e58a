"""The book: who is where, deletions that are made at once or not at all, a log that shows what was changed."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from overhaul import disk
from overhaul.deletion import audit
from overhaul.deletion.audit import Entry
from overhaul.deletion.book import BOOK, FOLDER, STAGES, Book, Example, Stage, key_of
from overhaul.deletion.sequences import cyclic, prefixes
from overhaul.errors import UserError

SECRET = b"secret"
ORDERS = (cyclic(2, 2), cyclic(2, 2))
TEXTS = {f"text {number}": (number % 2, number // 2 % 2) for number in range(8)}


def begun(directory: Path) -> Path:
    """A book of two shards of two slices with two sequences each, and eight examples."""
    (directory / FOLDER / STAGES).mkdir(parents=True)
    stages = []
    for shard, orders in enumerate(ORDERS):
        for order in prefixes(orders):
            name = f"{STAGES}/{shard}-{'-'.join(map(str, order))}.safetensors"
            path = directory / FOLDER / name
            path.write_bytes(bytes([shard, *order]) * 100)
            stages.append(Stage(shard, order, name, disk.sha256(path), path.stat().st_size))
    examples = [
        Example(key_of(SECRET, text), *where, copies=1 + (text == "text 3"), tags=(("user", text[-1]), ("id", text)))
        for text, where in TEXTS.items()
    ]
    told = {"by": "somebody"}
    Book.begin(
        directory, settings={"rank": 8}, orders=ORDERS, examples=examples, stages=stages, secret=SECRET, told=told
    )
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return begun(tmp_path / "model")


def test_what_was_trained_is_there(directory: Path):
    with Book(directory) as book:
        assert book.settings == {"rank": 8}
        assert book.orders == ORDERS
        assert len(book.stages()) == 2 * 4
        assert book.counts() == {(shard, place): 2 for shard in range(2) for place in range(2)}
        assert book.verify() == 1
        assert book.entries()[0].what["by"] == "somebody"


def test_examples_are_found_by_what_they_hold_and_by_columns(directory: Path):
    with Book(directory) as book:
        key = key_of(SECRET, "text 5")
        assert book.find_content("text 5").there == (key,)
        assert book.find(("user", "5")).there == (key,)
        assert book.find(("id", "text 5")).there == (key,)
        for nothing in (book.find_content("text 9"), book.find(("user", "text 5")), book.find(("id", "5"))):
            assert nothing == ((), ())


def test_a_deletion_erases_what_was_trained_with_the_slice(directory: Path):
    with Book(directory) as book:
        entry = book.delete([key_of(SECRET, "text 3")], {"by": "me"})
        assert entry.what["slices"] == [[1, 1]]
        assert entry.what["rows"] == 2, "both copies"
        assert {(stage.shard, stage.sequence) for stage in book.stages()} == {
            (0, (0,)), (0, (0, 1)), (0, (1,)), (0, (1, 0)), (1, (0,)),
        }  # fmt: skip
        assert book.survivors().serving(1) == (0,)
        assert {path.name for path in (directory / FOLDER / STAGES).glob("1-*")} == {"1-0.safetensors"}
        assert book.counts()[1, 1] == 1
        assert book.num_deleted() == 1
        assert book.verify(head=entry.hash) == 3


def test_what_is_deleted_is_known_as_deleted(directory: Path):
    with Book(directory) as book:
        key = key_of(SECRET, "text 3")
        book.delete([key], {})
        assert book.find_content("text 3") == ((), (key,))
        assert book.find(("user", "3")) == ((), (key,))
        with pytest.raises(UserError, match="is not in this model's data"):
            book.delete([key], {})
        assert book.verify() == 3


def test_a_deletion_of_an_unknown_example_changes_nothing(directory: Path):
    with Book(directory) as book:
        before = book.stages()
        with pytest.raises(UserError, match="is not in this model's data"):
            book.delete([key_of(SECRET, "text 3"), b"unknown"], {})
        assert book.stages() == before
        assert book.verify() == 1


def test_all_of_a_shard_can_be_deleted(directory: Path):
    with Book(directory) as book:
        for text in ("text 1", "text 3"):
            last = book.delete([key_of(SECRET, text)], {})
        assert last.what["shards_gone"] == [1]
        assert book.survivors().serving(1) == ()
        assert not book.survivors().is_gone


def test_no_text_and_no_column_is_in_the_file(directory: Path):
    with Book(directory) as book:
        book.delete([key_of(SECRET, "text 3")], {})
    content = (directory / FOLDER / BOOK).read_bytes()
    assert b"text 3" not in content
    assert b"user" not in content


def _changed(directory: Path, *statements: str) -> None:
    with closing(sqlite3.connect(directory / FOLDER / BOOK)) as sql, sql:
        for statement in statements:
            sql.execute(statement)


def test_the_log_refuses_changes(directory: Path):
    for statement in ("update audit set what = '{}'", "delete from audit"):
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            _changed(directory, statement)


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("""update audit set what = replace(what, 'somebody', 'nobody')""", "entry 1 of the audit log was changed"),
        ("delete from audit where number = 2", "entry 3 where entry 2 belongs"),
        ("delete from audit where number >= 2", "was cut off, or written anew"),
        ("delete from stages where shard = 0", "of no stage that is in use"),
        ("update stages set sha256 = '00' where shard = 0", "is not the file that was trained"),
    ],
)
def test_what_was_changed_behind_its_back_is_seen(directory: Path, statement: str, told: str):
    with Book(directory) as book:
        head = book.delete([key_of(SECRET, "text 3")], {}).hash
    _changed(directory, "drop trigger unchanged", "drop trigger kept", statement)
    with Book(directory) as book, pytest.raises(UserError, match=told):
        book.verify(head=head)


def test_files_that_were_changed_or_put_back_are_seen(directory: Path):
    stages = directory / FOLDER / STAGES
    erased = (stages / "1-1.safetensors").read_bytes()
    with Book(directory) as book:
        book.delete([key_of(SECRET, "text 3")], {})
        (stages / "1-1.safetensors").write_bytes(erased)
        with pytest.raises(UserError, match="of no stage that is in use"):
            book.verify()
        (stages / "1-1.safetensors").unlink()
        (stages / "0-0.safetensors").write_bytes(b"other")
        with pytest.raises(UserError, match="is not the file that was trained"):
            book.verify()


def test_a_directory_without_a_book_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no model that examples can be deleted from"):
        Book(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Book(tmp_path / "elsewhere")
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / BOOK).write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="is damaged"):
        Book(tmp_path)


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from overhaul.deletion.book import Book, key_of

for number, directory in enumerate(sys.argv[1:]):
    child = os.fork()
    if child == 0:
        with Book(Path(directory)) as book:
            book.delete([key_of(b"secret", "text 3")], {"by": "me"})
        time.sleep(60)
    time.sleep(number * 0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_killed_anywhere_it_is_deleted_or_not(tmp_path: Path):
    """20 processes are killed with SIGKILL, from where they begin to behind their end."""
    directories = [begun(tmp_path / str(number)) for number in range(20)]
    subprocess.run([sys.executable, "-c", _KILLED, *map(str, directories)], check=True)
    for directory in directories:
        with Book(directory) as book:
            book.sweep()
            deleted = book.num_deleted() == 1
            left = {(stage.shard, stage.sequence) for stage in book.stages()}
            assert ((1, (1,)) in left) == (not deleted)
            assert len(list((directory / FOLDER / STAGES).iterdir())) == len(left) == (5 if deleted else 8)
            assert book.verify() == (3 if deleted else 1)


def test_entries_seal_those_before_them():
    first = Entry.after(None, {"a": 1})
    second = Entry.after(first, {"b": [1, 2]})
    assert audit.check([first, second]) == 2
    assert audit.check([first, second], head=first.hash) == 2
    assert audit.check([]) == 0
    assert Entry.after(None, {"a": 1}) == first
    for wrong in ([second], [first, Entry(2, {"b": [1]}, second.hash)], [first, Entry(3, second.what, second.hash)]):
        with pytest.raises(UserError, match="audit log"):
            audit.check(wrong)
