"""`overhaul --help`: how long a user waits for it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from bench.inputs import Inputs
from bench.results import Row, Target

ROUNDS = 9
HELP = [sys.executable, "-m", "overhaul", "--help"]
NOTHING = [sys.executable, "-c", "pass"]
COUNT_TORCH = (
    "import contextlib, sys; from overhaul import cli\n"
    "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None): cli.main(['--help'])\n"
    "sys.exit(sum(name.split('.')[0] == 'torch' for name in sys.modules))"
)


def startup(_inputs: Inputs, _peers: Path) -> list[Row]:
    """Rows of the help's time, best of several, and of torch modules imported for it."""
    helps, nothings = zip(*[(_seconds(HELP), _seconds(NOTHING)) for _ in range(ROUNDS)], strict=True)
    settings = {"rounds": ROUNDS, "python_alone": round(min(nothings), 3), "all": [round(one, 3) for one in helps]}
    modules = subprocess.run([sys.executable, "-c", COUNT_TORCH], check=False).returncode
    return [
        Row(
            id="overhaul-help/seconds",
            kind="bench",
            what="`overhaul --help`, best of several",
            unit="s",
            values=(min(helps),),
            target=Target("<", 0.3),
            settings=settings,
        ),
        Row(
            id="overhaul-help/torch",
            kind="bench",
            what="Modules of torch that `overhaul --help` imports",
            unit="count",
            values=(float(modules),),
            target=Target("==", 0),
        ),
    ]


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began
