"""Intruders of an adapter and rank of its change by `measure spectra`: with nothing kept, a known base, all kept."""

import shutil
from pathlib import Path

import turn

from overhaul.spectra import Cache, look
from overhaul.stored import stored

given = turn.settings()
cache = Cache(Path(given["work"]) / "spectra")
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing read


def count(adapter: str) -> None:
    turn.wait()
    found = list(look(stored(given["model"]), stored(adapter), k=10, vectors="left", cache=cache))
    turn.tell(intruders=sum(len(matrix.intruders(0.5)) for matrix in found), matrices=len(found))


for _ in range(given["rounds"]):
    shutil.rmtree(cache.directory, ignore_errors=True)
    count(given["adapter"])
    count(given["other"])
    count(given["adapter"])
turn.wait()
