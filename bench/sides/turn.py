"""A side's half of taking turns: it waits to be called, does its piece, and tells what that took.

Both sides of a bench live in processes of their own, perhaps of different environments, and work one after the
other, piece by piece, so that a machine that is fast now and slow in a minute is so for both. Imported by the
scripts beside it and by nothing else; it needs no package, so that it runs wherever a peer is installed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# What libraries print goes to stderr; the pipe to the driver is for the protocol alone.
_channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
_began = (0.0, 0.0)


def settings() -> dict[str, Any]:
    """What the driver wants, from the command line."""
    return json.loads(sys.argv[1])


def wait() -> None:
    """Blocks until it is this side's turn, then starts the clocks; ends the process when no turn comes any more."""
    if not sys.stdin.readline():
        sys.exit(0)
    start()


def start() -> None:
    """Starts the clocks anew, where a turn begins with work that does not count and may not disturb the other side."""
    global _began
    _began = time.perf_counter(), time.process_time()


def tell(**facts: Any) -> None:
    """Ends the turn: seconds of wall and processor since it began, memory, and `facts`."""
    seconds, cpu_seconds = time.perf_counter() - _began[0], time.process_time() - _began[1]
    told = {"seconds": seconds, "cpu_seconds": cpu_seconds, **_memory(), "facts": facts}
    print(json.dumps(told), file=_channel, flush=True)


def forget_peak() -> None:
    """Starts a new high-water mark of memory."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory() -> dict[str, int]:
    """Resident memory now and at its highest, from Linux."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(status[key].split()[0]) * 1024 for name, key in (("rss_bytes", "VmRSS"), ("peak_rss_bytes", "VmHWM"))
    }
