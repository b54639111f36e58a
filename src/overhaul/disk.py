"""Writing a directory as a whole or not at all, and telling the user what the disk refused."""

from __future__ import annotations

import contextlib
import errno
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
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EFBIG, errno.EIO)


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
