"""Texts to be learnt and forgotten, as files: the parts that unlearning and `measure muse` read.

forget.jsonl   retain.jsonl   holdout.jsonl       texts of one kind, none in two
known.jsonl                                       the first two together
forget-questions.jsonl   retain-questions.jsonl   about the first two
shots.jsonl                                       answered questions about neither
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overhaul import disk
from overhaul.errors import UserError

Row = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetSet:
    """All parts, as rows of columns.

    Attributes:
        forget, retain, holdout: each with `text`.
        forget_questions, retain_questions, shots: each with `question` and `answer`.
    """

    forget: Sequence[Row]
    retain: Sequence[Row]
    holdout: Sequence[Row]
    forget_questions: Sequence[Row]
    retain_questions: Sequence[Row]
    shots: Sequence[Row]


def refuse_taken(directory: Path) -> None:
    """Raises `UserError` for a directory that has something in it."""
    if disk.is_taken(directory):
        raise UserError(f"{directory} is there already", hint="-o with a new name; nothing is overwritten")


def write(parts: ForgetSet, directory: Path) -> dict[str, int]:
    """Writes all parts into a new directory.

    Args:
        parts: what.
        directory: that is not there yet, or empty.

    Returns:
        Rows by file.

    Raises:
        UserError: something is there, or the disk is full or cannot be written.
    """
    refuse_taken(directory)
    files = {
        "forget": parts.forget,
        "retain": parts.retain,
        "holdout": parts.holdout,
        "forget-questions": parts.forget_questions,
        "retain-questions": parts.retain_questions,
        "known": [*parts.forget, *parts.retain],
        "shots": parts.shots,
    }
    with disk.aside(directory) as made:
        for name, rows in files.items():
            (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {f"{name}.jsonl": len(rows) for name, rows in files.items()}
