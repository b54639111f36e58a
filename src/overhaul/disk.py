"""Writing a directory as a whole or not at all, and telling the user what the disk refused."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from overhaul.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EFBIG, errno.EIO)


def sha256(path: Path) -> str:
    """Of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_taken(target: Path) -> bool:
    """Whether a place for a new directory has something already: a file, or a directory with something in it."""
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into; renamed to `target` when the block ends well, removed when not.

    When the block ends, `target` must not be there or be an empty directory.

    Raises:
        UserError: the disk is full or cannot be written; the partial output is gone.
    """
    partial = None
    with refusals(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
            yield partial
            _open_to_others(partial)
            try:
                partial.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                finished, partial = partial, None
                raise UserError(
                    f"{target} was filled by something else meanwhile; the finished result is in {finished}",
                    hint=f"mv {finished} ELSEWHERE",
                ) from error
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_files(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Places to write files to, beside the first target; all are put where they belong when the block ends well.

    Args:
        targets: files that are not there yet.

    Raises:
        UserError: one is there, before or after the block; the disk is full or cannot be written. No file is left.
    """
    for target in targets:
        _refuse(target)
    with refusals(targets[0]):
        targets[0].absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{targets[0].name}.partial-", dir=targets[0].parent) as aside:
            places = tuple(Path(aside) / target.name for target in targets)
            yield places
            _open_to_others(Path(aside))
            placed: list[Path] = []
            try:
                for place, target in zip(places, targets, strict=True):
                    _put(place, target)
                    placed.append(target)
            except BaseException:
                for target in placed:
                    target.unlink(missing_ok=True)
                raise


def _refuse(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists", hint="another name; nothing is ever overwritten")


def _put(place: Path, target: Path) -> None:
    try:
        os.link(place, target)  # a rename would replace what came there meanwhile
    except OSError:  # it is there, or the file system knows no links
        _refuse(target)
        place.rename(target)


def made_once(target: Path, marker: str, make: Callable[[Path], None]) -> Path:
    """A directory of a cache that is made by the first process that wants it; others wait, and find it.

    Args:
        target: the directory.
        marker: a file in it, without which it is not there yet.
        make: fills a directory beside it, which is then renamed.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    with refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
    with lock:
        if not (target / marker).is_file():
            with aside(target) as made:
                make(made)
    return target


@contextlib.contextmanager
def refusals(target: Path) -> Iterator[None]:
    """Inside, a disk that is full or cannot be written raises `UserError` about `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number in _FULL:
            raise UserError(
                f"the disk is full while writing {target}", hint="a larger disk; nothing partial was left"
            ) from error
        if number in _REFUSED:
            raise UserError(
                f"{target} cannot be written: {os.strerror(number)}", hint="a directory of your own"
            ) from error
        raise


def _open_to_others(directory: Path) -> None:
    """Gives files and directories the permissions that any new one has; some are made for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    directory.chmod(0o777 & ~umask)
    for file in directory.rglob("*"):
        file.chmod((0o666 if file.is_file() else 0o777) & ~umask)


def _number(error: Exception) -> int | None:
    """The system's number of an error; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
