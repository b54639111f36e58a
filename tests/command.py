"""The command line for tests: in this process, or in one of its own where a process is the point."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from overhaul import checkpoint, cli, train

WIDE = {"COLUMNS": "1000"}
"""A terminal on which no sentence is broken."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        """What the box on stderr says, on one line and without its frame."""
        return " ".join(self.err.replace("│", " ").split())


def overhaul(*arguments: object) -> Finished:
    """Runs `overhaul ARGUMENTS` in this process: importing torch anew takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.dict(os.environ, WIDE),
        patch.object(sys, "argv", ["overhaul", *map(str, arguments)]),
    ):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
    assert isinstance(code, int)
    return Finished(code, out.getvalue(), err.getvalue())


def python(code: str, *arguments: object, env: Mapping[str, str] | None = None) -> Finished:
    """Runs Python code in a process of its own, with `arguments` in `sys.argv[1:]`."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(env), timeout=300)
    return Finished(done.returncode, done.stdout, done.stderr)


def interrupted(when: Callable[[list[int]], bool], *arguments: object) -> Finished:
    """As `overhaul`, with Ctrl-C in place of the first optimizer step of which `when` says so.

    Args:
        when: is given the numbers of all steps so far, those of one plan behind those of another, with this one.
        arguments: of the command.
    """
    step, seen = train._Run.step, []

    def stop(self: Any, number: int) -> Any:
        seen.append(number)
        if when(seen):
            raise KeyboardInterrupt
        return step(self, number)

    with patch.object(train._Run, "step", stop):
        return overhaul(*arguments)


def killed_at_the_third_step(*command: object) -> int:
    """The signal that ends a process which runs a command: a fork of this one, so that torch is there already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child has no use for
        child = os.fork()
    if not child:
        write = checkpoint.write

        def and_die(root: Path, step: int, **rest: Any) -> None:
            if step == 3:
                (root / ".partial-1").mkdir()
                os.kill(os.getpid(), signal.SIGKILL)
            write(root, step, **rest)

        checkpoint.write = and_die
        try:
            overhaul(*command)
        finally:
            os._exit(1)  # it should have been killed
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a child, with one thread: tests share the cores."""
    return {**os.environ, **WIDE, "OMP_NUM_THREADS": "1", **(more or {})}


def contents(directory: Path) -> dict[str, str]:
    """The hash of every file below a directory, by relative path."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def refused(done: Finished, *words: str) -> None:
    """Checks that a command was refused as every mistake of a user is: exit 2, one box, no traceback."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert done.err.count("╭") == 1, done.err
    assert done.out == ""
    for word in words:
        assert word in done.told, done.told
