"""The driver's half of taking turns: ours and the peer's in processes of their own, piece by piece, alternately."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

SIDES = Path(__file__).parent / "sides"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one piece of work took.

    Attributes:
        seconds: of wall time.
        cpu_seconds: of all threads together.
        rss_bytes, peak_rss_bytes: resident memory of the process, now and at its highest.
        facts: what else the side tells.
    """

    seconds: float
    cpu_seconds: float
    rss_bytes: int
    peak_rss_bytes: int
    facts: dict[str, Any]


class Side:
    """A script of `bench/sides` in a process of its own, which works only when it is its turn."""

    def __init__(self, script: str, settings: dict[str, Any], python: str = sys.executable) -> None:
        self.script = script
        self.process = subprocess.Popen(
            [python, str(SIDES / script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self) -> Turn:
        """Lets the side do its next piece.

        Raises:
            RuntimeError: the side's process ended instead.
        """
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.script} ended with exit code {self.process.wait()}; its error is above")
        return Turn(**json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def in_turn(ours: Side, peer: Side, pieces: int) -> tuple[list[Turn], list[Turn]]:
    """The next `pieces` turns of both, alternately; who goes first alternates too. Both processes end."""
    done: dict[Side, list[Turn]] = {ours: [], peer: []}
    with ExitStack() as stack:
        for side in done:
            stack.enter_context(side)
        for piece in range(pieces):
            for side in (ours, peer) if piece % 2 == 0 else (peer, ours):
                done[side].append(side.turn())
                print(f"  {side.script} {piece + 1}/{pieces}: {done[side][-1].seconds:.2f} s", file=sys.stderr)
    return done[ours], done[peer]
