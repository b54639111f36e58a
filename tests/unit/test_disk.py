"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overhaul.disk import new_files
from overhaul.errors import UserError


def test_several_files_come_together(tmp_path: Path):
    targets = tmp_path / "new" / "a.txt", tmp_path / "new" / "b.txt"

    with new_files(*targets) as places:
        for place in places:
            place.write_text(place.name)
        assert not any(target.exists() for target in targets)

    assert [target.read_text() for target in targets] == ["a.txt", "b.txt"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.txt", "b.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert targets[0].stat().st_mode & 0o777 == 0o666 & ~umask


def write_both(folder: Path, *, meanwhile: Callable[[], object]) -> None:
    with new_files(folder / "a.txt", folder / "b.txt") as places:
        for place in places:
            place.write_text("ours")
        meanwhile()


def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path):
    with pytest.raises(ZeroDivisionError):
        write_both(tmp_path, meanwhile=lambda: 1 / 0)

    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_kept(tmp_path: Path):
    (tmp_path / "b.txt").write_text("mine")

    with pytest.raises(UserError, match=r"b.txt exists"), new_files(tmp_path / "a.txt", tmp_path / "b.txt"):
        pytest.fail("the block is not entered")
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


def test_a_file_that_came_meanwhile_is_kept_and_the_others_are_taken_back(tmp_path: Path):
    with pytest.raises(UserError, match=r"b.txt exists"):
        write_both(tmp_path, meanwhile=lambda: (tmp_path / "b.txt").write_text("mine"))

    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]
    assert (tmp_path / "b.txt").read_text() == "mine"


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with new_files(tmp_path / "a.txt") as (place,):
        place.write_text("whole")

    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match="cannot be written"), new_files(tmp_path / "file" / "a.txt"):
        pytest.fail("the block is not entered")
