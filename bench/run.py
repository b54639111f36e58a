"""`python -m bench.run [NAME ...]`: measures against peers and records the rows."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import (
    banks,
    deletion,
    distill,
    half,
    int8,
    learning,
    muse,
    optimizers,
    perp,
    pruning,
    recipes,
    sltrain,
    spectra,
    startup,
    stream,
    training,
    which,
)
from bench.inputs import Inputs
from bench.results import ROOT, Row, record
from bench.tables import number

BENCHES: dict[str, Callable[[Inputs, Path], list[Row]]] = {
    "help": startup.startup,
    "full": training.full,
    "lora": training.lora,
    "fira": optimizers.fira,
    "randlora": training.randlora,
    "hft": training.hft,
    "sltrain": sltrain.scratch,
    "perp-norms": perp.norms,
    "perp-mask-lora": perp.mask_lora,
    "divergence": distill.divergence,
    "distill-step": distill.step,
    "int8": int8.int8,
    "learn": learning.tasks,
    "refresh": learning.refresh,
    "banks": banks.banks,
    "s3t": deletion.s3t,
    "muse": muse.muse,
    "spectra": spectra.spectra,
    "stream": stream.stream,
    "wanda": pruning.wanda,
    "sparsegpt": pruning.sparsegpt,
    "half": half.roads,
    "which-adapter": which.candidates,
    "recipe-minitron": recipes.minitron,
    "wanda-fp32-peer": pruning.wanda_fp32_peer,
    "sparsegpt-fp32-peer": pruning.sparsegpt_fp32_peer,
}


def main() -> None:
    """Runs the named benches, or all; rows are recorded as each ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"any of {', '.join(BENCHES)}; none means all")
    parser.add_argument(
        "--peers",
        type=Path,
        default=ROOT / ".venv-peers/bin/python",
        help="interpreter of the environment that `make bench` fills from requirements-peers.txt",
    )
    asked = parser.parse_args()
    if unknown := set(asked.name) - set(BENCHES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    with tempfile.TemporaryDirectory() as work:
        inputs = Inputs.of(Path(work))
        for name in asked.name or BENCHES:
            print(name, file=sys.stderr)
            rows = BENCHES[name](inputs, asked.peers)
            record(rows)
            for row in rows:
                print(_line(row))


def _line(row: Row) -> str:
    ours = number(sum(row.values) / len(row.values), row.unit)
    against = f" against {number(sum(row.peer) / len(row.peer), row.unit)}: {row.ratio:.2f}" if row.peer else ""
    judged = {None: "", True: ", met", False: ", NOT MET"}[row.met]
    return f"{row.what}: {ours}{against}{judged}"


if __name__ == "__main__":
    main()
