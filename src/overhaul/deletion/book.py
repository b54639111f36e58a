"""The book of a model that examples can be deleted from: who is in which slice, what is trained, what was done.

model/s3t/book.sqlite     this, one SQLite database; what a command changes in it, it changes at once or not at all
model/s3t/stages/         a file of tensors for each stage: of a shard, and a beginning of one of its sequences

No text is in it: examples are known by a keyed hash of their content, and so is what they are asked for by.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from overhaul import disk
from overhaul.deletion import audit
from overhaul.deletion.audit import Entry
from overhaul.deletion.sequences import Order
from overhaul.deletion.survivors import Survivors
from overhaul.errors import UserError

FOLDER = "s3t"
"""Where all of it lies, beside the weights."""
BOOK, STAGES = "book.sqlite", "stages"

Key = bytes
"""An example, by a keyed hash of its content."""

_TABLES = """
create table about (name text primary key, value text not null) without rowid;
create table examples (key blob primary key, shard integer not null, slice integer not null, copies integer not null,
                       deleted integer) without rowid;
create table tags (tag blob not null, key blob not null, primary key (tag, key)) without rowid;
create table stages (shard integer not null, sequence text not null, file text not null, sha256 text not null,
                     bytes integer not null, primary key (shard, sequence)) without rowid;
create table hit (shard integer not null, slice integer not null, primary key (shard, slice)) without rowid;
create table erasing (file text primary key) without rowid;
create table audit (number integer primary key, what text not null, hash text not null);
create trigger unchanged before update on audit begin select raise(abort, 'the audit log only grows'); end;
create trigger kept before delete on audit begin select raise(abort, 'the audit log only grows'); end;
"""


@dataclass(frozen=True, slots=True)
class Example:
    """What is known of an example.

    Attributes:
        key: by which it is known.
        shard, slice: where it is, each counted from 0.
        copies: how often the data has it.
        tags: what it may be asked for by, such as `("user", "17")`.
    """

    key: Key
    shard: int
    slice: int
    copies: int = 1
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """What is trained of a shard, behind the stages that its sequence begins with.

    Attributes:
        shard: counted from 0.
        sequence: the slices that it was trained with; itself, and nothing else of the data, decides its tensors.
        file: beside the book.
        sha256: of the file.
        bytes: of the file.
    """

    shard: int
    sequence: Order
    file: str
    sha256: str
    bytes: int


class Found(NamedTuple):
    """Which examples a request is about.

    Attributes:
        there: keys of those that are still in.
        gone: keys of those that were deleted before.
    """

    there: tuple[Key, ...]
    gone: tuple[Key, ...]


class Book:
    """An open book. Use as a context manager, or `close` it.

    Args:
        directory: the model's.

    Raises:
        UserError: there is none, or it is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FOLDER / BOOK
        if not self.path.is_file():
            what = "is no model that examples can be deleted from" if directory.exists() else "does not exist"
            raise UserError(
                f"{directory} {what}",
                allowed="a directory that forget s3t wrote",
                hint="overhaul forget s3t MODEL -o DIR --data TEXT",
            )
        self._sql = sqlite3.connect(self.path, isolation_level=None, timeout=60)
        try:
            self._sql.execute("pragma secure_delete = on")
            self._sql.execute("pragma synchronous = full")
            told = dict(self._sql.execute("select name, value from about"))
            self.settings: dict[str, Any] = json.loads(told["settings"])
            self._secret = bytes.fromhex(told["secret"])
            self.orders: tuple[tuple[Order, ...], ...] = tuple(
                tuple(map(tuple, shard)) for shard in json.loads(told["orders"])
            )
        except (sqlite3.DatabaseError, KeyError, ValueError) as error:
            raise UserError(f"{self.path} is damaged: {error}", hint="a sound copy of the directory") from error

    @classmethod
    def begin(
        cls,
        directory: Path,
        *,
        settings: Mapping[str, Any],
        orders: Sequence[Sequence[Order]],
        examples: Iterable[Example],
        stages: Iterable[Stage],
        secret: bytes,
        told: Mapping[str, Any],
    ) -> Entry:
        """Writes a new book beside files of stages that are there.

        Args:
            directory: the model's.
            settings: what the stages fit, plain data.
            orders: the sequences of each shard.
            examples: all of them.
            stages: one for every beginning of a sequence.
            secret: the key of the hashes by which examples are known.
            told: by whom, when and with what it was trained, for the log; plain data.

        Returns:
            The log's first entry.
        """
        path = directory / FOLDER / BOOK
        with closing(sqlite3.connect(path, isolation_level=None)) as sql:
            sql.executescript(_TABLES)
            about = {"settings": json.dumps(settings), "orders": json.dumps(orders), "secret": secret.hex()}
            sql.execute("begin")
            sql.executemany("insert into about values (?, ?)", about.items())
            for one in examples:
                sql.execute(
                    "insert into examples values (?, ?, ?, ?, null)", (one.key, one.shard, one.slice, one.copies)
                )
                tags = {_keyed(secret, *tag) for tag in one.tags}
                sql.executemany("insert into tags values (?, ?)", [(tag, one.key) for tag in sorted(tags)])
            sql.executemany(
                "insert into stages values (?, ?, ?, ?, ?)",
                [(one.shard, json.dumps(one.sequence), one.file, one.sha256, one.bytes) for one in stages],
            )
            sql.execute("commit")
        with cls(directory) as book, book._at_once():
            return book._append({**told, "done": "trained", "state_after": book._state()})

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        self._sql.close()

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        """Inside, changes are made together; a process that is killed has made all of them, or none."""
        self._sql.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._sql.execute("rollback")
            raise
        self._sql.execute("commit")

    def key_of(self, content: str) -> Key:
        """By which an example with this content is known."""
        return key_of(self._secret, content)

    def find(self, tag: tuple[str, str]) -> Found:
        """The examples with a value in a column."""
        rows = self._sql.execute(
            "select key, deleted from tags join examples using (key) where tag = ?",
            (_keyed(self._secret, *tag),),
        ).fetchall()
        return _found(rows)

    def find_content(self, content: str) -> Found:
        """The example with some content; neither there nor gone where the data had none."""
        key = self.key_of(content)
        return _found(self._sql.execute("select key, deleted from examples where key = ?", (key,)).fetchall())

    def survivors(self) -> Survivors:
        """What may still be used."""
        return Survivors(self.orders, self._sql.execute("select shard, slice from hit").fetchall())

    def stages(self) -> tuple[Stage, ...]:
        """What is trained and was not erased."""
        rows = self._sql.execute("select shard, sequence, file, sha256, bytes from stages order by shard, sequence")
        return tuple(Stage(shard, tuple(json.loads(order)), *rest) for shard, order, *rest in rows)

    def counts(self) -> dict[tuple[int, int], int]:
        """How many examples are still in each slice of each shard."""
        rows = self._sql.execute(
            "select shard, slice, count(*) from examples where deleted is null group by shard, slice"
        )
        return {(shard, place): count for shard, place, count in rows}

    def num_deleted(self) -> int:
        """Examples that were deleted."""
        return self._sql.execute("select count(*) from examples where deleted is not null").fetchone()[0]

    def entries(self) -> tuple[Entry, ...]:
        """The audit log."""
        rows = self._sql.execute("select number, what, hash from audit order by number")
        return tuple(Entry(number, json.loads(what), seal) for number, what, seal in rows)

    def _last(self) -> Entry | None:
        """The log's last entry."""
        row = self._sql.execute("select number, what, hash from audit order by number desc limit 1").fetchone()
        return Entry(row[0], json.loads(row[1]), row[2]) if row else None

    def cells(self, keys: Sequence[Key]) -> dict[tuple[int, int], int]:
        """The slices that examples are in, each with how many rows of the data they are there.

        Raises:
            UserError: one of them is not in.
        """
        found: dict[tuple[int, int], int] = {}
        for key in keys:
            row = self._sql.execute(
                "select shard, slice, copies from examples where key = ? and deleted is null", (key,)
            ).fetchone()
            if row is None:
                raise UserError(f"example {key.hex()[:16]} is not in this model's data")
            shard, place, copies = row
            found[shard, place] = found.get((shard, place), 0) + copies
        return found

    def delete(self, keys: Sequence[Key], told: Mapping[str, Any]) -> Entry:
        """Takes examples out: their stages are no longer used, and are erased.

        The book is changed at once; then the files go. A process that is killed between them leaves files that
        `sweep` erases, and that nothing reads.

        Args:
            keys: of examples that are in.
            told: who asked for it and when, for the log; plain data.

        Returns:
            The log's new entry, whose hash is worth keeping elsewhere.

        Raises:
            UserError: one of them is not in.
        """
        with self._at_once():
            hit = self.cells(keys)
            before = self._state()
            self._sql.executemany("insert or ignore into hit values (?, ?)", hit)
            left = self.survivors()
            alive = [left.stages(shard) for shard in range(len(self.orders))]
            dead = [stage for stage in self.stages() if stage.sequence not in alive[stage.shard]]
            self._sql.executemany("insert or ignore into erasing values (?)", [(stage.file,) for stage in dead])
            self._sql.executemany(
                "delete from stages where shard = ? and sequence = ?",
                [(stage.shard, json.dumps(stage.sequence)) for stage in dead],
            )
            last = self._last()
            number = last.number + 1 if last else 1
            self._sql.executemany("update examples set deleted = ? where key = ?", [(number, key) for key in keys])
            what = {
                **told,
                "done": "deleted",
                "examples": [key.hex() for key in keys],
                "rows": sum(hit.values()),
                "slices": [[shard, place] for shard, place in sorted(hit)],
                "stages": [{"shard": s.shard, "sequence": s.sequence, "sha256": s.sha256} for s in dead],
                "state_before": before,
                "state_after": self._state(),
                "shards_gone": left.gone(),
            }
            entry = self._append(what)
        self.sweep()
        return entry

    def sweep(self) -> tuple[str, ...]:
        """Erases the files of stages that are no longer used; returns which there were."""
        files = [file for (file,) in self._sql.execute("select file from erasing")]
        for file in files:
            (self.path.parent / file).unlink(missing_ok=True)
        if files:
            with self._at_once():
                self._sql.execute("delete from erasing")
                self._append({"done": "erased", "files": files})
        return tuple(files)

    def _append(self, what: Mapping[str, Any]) -> Entry:
        what = json.loads(json.dumps(what))
        entry = Entry.after(self._last(), what)
        self._sql.execute("insert into audit values (?, ?, ?)", (entry.number, json.dumps(what), entry.hash))
        return entry

    def _state(self) -> str:
        """Hash of all stages that are in use: equal models have equal ones."""
        told = json.dumps([[stage.shard, stage.sequence, stage.sha256] for stage in self.stages()])
        return hashlib.sha256(told.encode()).hexdigest()

    def verify(self, *, head: str | None = None) -> int:
        """Checks that the log is whole, and that the files are those that it tells of; returns how many entries it has.

        Args:
            head: the hash of an entry that was noted elsewhere; None for none.

        Raises:
            UserError: the log was changed or cut, a file is not the one that was trained, or one that was erased is
                there.
        """
        entries = self.entries()
        count = audit.check(entries, head=head)
        folder = self.path.parent
        for stage in self.stages():
            path = folder / stage.file
            if not path.is_file() or disk.sha256(path) != stage.sha256:
                raise UserError(f"{path} is not the file that was trained", hint="a sound copy of the directory")
        known = {stage.file for stage in self.stages()}
        there = sorted(f"{STAGES}/{path.name}" for path in (folder / STAGES).glob("*"))
        if strange := [name for name in there if name not in known]:
            raise UserError(
                f"{folder / strange[0]} is of no stage that is in use", allowed="files of the book's stages"
            )
        states = [entry.what["state_after"] for entry in entries if "state_after" in entry.what]
        if states[-1:] != [self._state()]:
            raise UserError(
                "the stages in use are not those that the audit log ends with", allowed="the book as it was"
            )
        return count


def _found(rows: Sequence[tuple[Key, int | None]]) -> Found:
    """Of keys, each with the number of the entry that it was deleted by, or None."""
    return Found(tuple(key for key, by in rows if by is None), tuple(key for key, by in rows if by is not None))


def key_of(secret: bytes, content: str) -> Key:
    """By which an example with some content is known.

    Args:
        secret: of the book.
        content: of the example.
    """
    return _keyed(secret, "content", content)


def _keyed(secret: bytes, *parts: str) -> bytes:
    told = json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hmac.digest(secret, told, "sha256")[:16]
