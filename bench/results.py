"""docs/results.json: what was measured, on which machine, at which commit; every table in the docs is made from it.

A row is one statement. A claim has one value per seed and holds if every seed meets the target. A bench has one
value of ours and one of the peer per round, taken in turn; its target is on the median of the rounds' ratios.
"""

from __future__ import annotations

import datetime
import json
import operator
import os
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.json"

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be reached: `Target(">=", 0.6)`."""

    sign: Literal["<=", ">=", "<", ">", "=="]
    value: float

    def met_by(self, number: float) -> bool:
        """Whether `number` reaches it."""
        return bool(_COMPARE[self.sign](number, self.value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured statement.

    Attributes:
        id: `verb-method/what`; a later row with the same id replaces this one.
        kind: a claim of a paper, a comparison with a peer, or a quantity of a model beside others of a folder.
        what: the statement's subject, as a table shows it.
        values: ours, one per seed or round.
        unit: of the values; empty for a plain number, `share` is shown in percent.
        peer: the peer's values, one per round, in the same unit.
        peer_name: what the peer is, with its version.
        gain: which way round the ratio is: `ours/peer`, or `peer/ours` where less is better.
        target: what is to be reached; None only records.
        seeds: of the values.
        settings: everything else needed to measure it again.
    """

    id: str
    kind: Literal["claim", "bench", "model"]
    what: str
    values: tuple[float, ...]
    unit: str = ""
    peer: tuple[float, ...] = ()
    peer_name: str = ""
    gain: Literal["ours/peer", "peer/ours"] = "ours/peer"
    target: Target | None = None
    seeds: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Median over the rounds of ours to the peer's; the median, because other work on the machine only slows."""
        if not self.peer:
            return None
        pairs = list(zip(self.values, self.peer, strict=True))
        return statistics.median(ours / peer if self.gain == "ours/peer" else peer / ours for ours, peer in pairs)

    @property
    def met(self) -> bool | None:
        """Whether the ratio, or without a peer every single value, reaches the target."""
        if self.target is None:
            return None
        judged = self.values if self.ratio is None else [self.ratio]
        return all(self.target.met_by(value) for value in judged)

    def to_json(self) -> dict[str, Any]:
        """Everything, with what follows from it, and where and when it was measured."""
        return {
            **asdict(self),
            "values": [_rounded(value) for value in self.values],
            "mean": _rounded(statistics.fmean(self.values)),
            "spread": _rounded(max(self.values) - min(self.values)),
            "peer": [_rounded(value) for value in self.peer],
            "ratio": None if self.ratio is None else _rounded(self.ratio),
            "target": f"{self.target.sign} {self.target.value:g}" if self.target else None,
            "met": self.met,
            "commit": _commit(),
            "machine": _machine(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows, in the order of their ids; none when nothing was recorded yet."""
    return json.loads(path.read_text()) if path.is_file() else []


def record(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Merges rows into the file: a row with a known id replaces it, all others stay."""
    kept = {row["id"]: row for row in read(path)} | {row.id: row.to_json() for row in rows}
    aside = path.with_suffix(".new")
    # One row a line: a later measurement is a readable difference.
    lines = ",\n".join(json.dumps(kept[key], ensure_ascii=False) for key in sorted(kept))
    aside.write_text(f"[\n{lines}\n]\n")
    aside.replace(path)


def hold(*rows: Row, path: Path = RESULTS) -> None:
    """Records rows, then asserts that each reaches its target: all are recorded before one is judged."""
    record(rows, path)
    for row in rows:
        assert row.met is not False, row


def _rounded(value: float) -> float:
    """Five significant digits, more than any of these numbers has."""
    return float(f"{value:.5g}")


@cache
def _commit() -> str:
    """The commit, with `-dirty` when what is measured differs from it."""
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}-dirty" if _git("status", "--porcelain", "--", "src", "bench", "tests/claims", "recipes") else head


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@cache
def _machine() -> dict[str, Any]:
    import psutil
    import torch

    from overhaul import machine

    return {
        "hardware": machine.hardware(torch.device("cpu")),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "torch": torch.__version__,
    }
