"""The candidates of the tutorial on adapters, as it types them: what each won, forgot and cost."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from bench import comparing
from bench.inputs import Inputs
from bench.results import ROOT, Row

TUTORIAL = ROOT / "docs" / "tutorials" / "which-adapter.md"


def candidates(inputs: Inputs, _peers: Path) -> list[Row]:
    """For every model of the tutorial its gain, forgetting and costs."""
    page = TUTORIAL.read_text()
    (task,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    subprocess.run([sys.executable, "-c", task], cwd=inputs.work, check=True)
    typed = [shlex.split(line) for line in re.findall(r"^overhaul (.*)$", page, re.MULTILINE)]
    *made, compare = typed
    for words in made:
        comparing.overhaul(inputs.work, *words)
    _, models = comparing.compared(inputs.work, *compare[1:])
    settings = {"model": inputs.model.name, "commands": [shlex.join(["overhaul", *words]) for words in typed]}
    return comparing.adapted_rows(models, "which", settings)
