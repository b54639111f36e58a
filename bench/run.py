"""Speed and memory against peers, in turn in one run, as ratios. `python bench/run.py [NAME ...]`.

Each side is a process of its own on the same model, windows and threads. The numbers go to `docs/results.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from overhaul import artifact, machine, pretrained
from overhaul.corpora import open_corpus
from overhaul.data import Data
from overhaul.evaluate import perplexity
from results import ROOT, Result, record

BENCH = ROOT / "bench"
PEERS = Path(os.environ.get("PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))
ROUNDS = 2


def run(python: Path | str, script: str, *arguments: object) -> dict[str, Any]:
    """Runs one side; its last line of output is its result."""
    command = [str(python), str(BENCH / script), *(str(argument) for argument in arguments)]
    print("+", " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stderr[-3000:]}")
    print(" ", done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


class Setting:
    """The model and windows that both sides get."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = pretrained.resolve(pretrained.DEFAULT)
        self.data = Data(open_corpus("boolq-passages"), AutoTokenizer.from_pretrained(self.model))

    def windows(self, name: str, tensor_NT: torch.Tensor) -> Path:
        """Stores windows for both sides."""
        torch.save(tensor_NT, self.folder / f"{name}.pt")
        return self.folder / f"{name}.pt"

    def calibration(self) -> Path:
        """32 windows of 512 tokens."""
        stream = self.data.calibration(samples=32, seq_len=512, batch_size=32)
        return self.windows("calibration", next(stream)["input_ids"])

    def heldout(self) -> Path:
        """32 windows of 256 tokens."""
        return self.windows("heldout", self.data.windows("heldout", seq_len=256, limit=32))

    def training(self, count: int) -> Path:
        """Windows of 256 tokens."""
        return self.windows("training", self.data.windows("train", seq_len=256, limit=count))

    def perplexity(self, directory: Path) -> float:
        """Of a saved model on the held-out windows."""
        model = artifact.load(directory).model
        return perplexity(model, torch.load(self.heldout()), dtype=torch.bfloat16).estimate.value


def prune(setting: Setting, method: str, least: float) -> None:
    """Pruning to half against llmcompressor, time and perplexity."""
    calibration = setting.calibration()
    ours, theirs = [], []
    outs = {side: setting.folder / f"{method}-{side}" for side in ("ours", "theirs")}
    for _ in range(ROUNDS):
        ours.append(run(sys.executable, "ours_prune.py", method, setting.model, calibration, outs["ours"]))
        theirs.append(run(PEERS, "peer_llmcompressor.py", method, setting.model, calibration, outs["theirs"]))
    own, other = setting.perplexity(outs["ours"]), setting.perplexity(outs["theirs"])
    settings = {
        "model": pretrained.DEFAULT,
        "windows": "32 x 512",
        "sparsity": 0.5,
        "peer_dtype": "fp32",
        "dtype": "bf16",
    }
    page, peer = f"prune-{method}", "llmcompressor 0.14"
    record(
        _versus(f"bench-{method}-seconds", page, f"{method} to 50%, 32 x 512 tokens", "s", f">= {least:g}", peer,
                [side["seconds"] for side in ours], [side["seconds"] for side in theirs], settings),
        Result(id=f"bench-{method}-perplexity", kind="bench", method=page, what=f"{method} to 50%: perplexity, ours by theirs",
               values=[own], unit="", peer=peer, peer_values=[other], ratio=own / other, target="<= 1.01", settings=settings),
    )  # fmt: skip
    if method == "wanda":
        _pruning_memory(ours[-1], settings)


def _pruning_memory(side: dict[str, Any], settings: dict[str, Any]) -> None:
    added = side["peak_rss_bytes"] - side["imported_bytes"]
    record(
        Result(
            id="bench-wanda-memory", kind="bench", method="prune-wanda", unit="bytes", target="<= 1.3", settings=settings,
            what="peak memory of pruning above that of the imports", values=[added], ratio=added / side["model_bytes"],
            peer="the model's bytes", peer_values=[side["model_bytes"]],
        )
    )  # fmt: skip


def training(setting: Setting, method: str, script: str, peer: str, least: float) -> None:
    """A training step of 4 x 256 tokens against the usual loop."""
    steps, batch = 7, 4
    windows = setting.training(steps * batch)
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(run(sys.executable, "ours_train.py", method, setting.model, windows, steps, batch))
        theirs.append(run(sys.executable, script, setting.model, windows, steps, batch))
    times = [[statistics.median(one["seconds_per_step"]) for one in side] for side in (ours, theirs)]
    settings = {"model": pretrained.DEFAULT, "batch": "4 x 256", "steps": steps}
    page = f"adapt-{method}"
    peaks = [[one["peak_rss_bytes"] for one in side] for side in (ours, theirs)]
    record(
        _versus(f"bench-{method}-step", page, f"adapt {method}: a step of 4 x 256 tokens", "s", f">= {least:g}", peer, *times, settings),
        Result(id=f"bench-{method}-memory", kind="bench", method=page, what=f"adapt {method}: peak memory of the process",
               values=peaks[0], seeds=range(ROUNDS), unit="bytes", peer=peer, peer_values=peaks[1],
               ratio=statistics.mean(peaks[0]) / statistics.mean(peaks[1]),
               target="<= 0.8" if method == "full" else "", settings=settings),
    )  # fmt: skip


def perp(setting: Setting, which: str) -> None:
    """100 steps of 2 x 256 tokens after magnitude pruning, against a plain script."""
    steps, batch, lr = 100, 2, 2e-3
    arguments = [which, setting.model, setting.training(steps * batch), setting.heldout(), steps, batch, lr]
    ours = run(sys.executable, "ours_perp.py", *arguments)
    theirs = run(sys.executable, "peer_perp.py", *arguments)
    settings = {"model": pretrained.DEFAULT, "batch": "2 x 256", "steps": steps, "lr": lr, "corpus": "boolq-passages"}
    peer = "a plain script"
    record(
        _versus(f"bench-perp-{which}-seconds", "adapt-perp", f"PERP {which}, 100 steps of 2 x 256 tokens", "s", ">= 1.7", peer,
                [ours["seconds"]], [theirs["seconds"]], settings),
        Result(id=f"bench-perp-{which}-perplexity", kind="bench", method="adapt-perp",
               what=f"PERP {which}: perplexity afterwards (pruned: {ours['before']:.0f})", values=[ours["after"]], unit="",
               peer=peer, peer_values=[theirs["after"]], ratio=ours["after"] / theirs["after"], target="<= 1.02", settings=settings),
    )  # fmt: skip


def help_seconds(_setting: Setting) -> None:
    """`overhaul --help` against an empty Python process."""

    def seconds(*command: str) -> float:
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    pairs = [(seconds(sys.executable, "-m", "overhaul", "--help"), seconds(sys.executable, "-c", "")) for _ in range(5)]
    record(
        Result(id="bench-help", kind="bench", method="cli", what="overhaul --help", unit="s", target="<= 0.3",
               values=[own for own, _ in pairs], seeds=range(5), peer="python -c ''", peer_values=[empty for _, empty in pairs])
    )  # fmt: skip


def _versus(
    key: str, page: str, what: str, unit: str, target: str, peer: str, ours: list[float], theirs: list[float], settings: dict[str, Any]
) -> Result:  # fmt: skip
    """A time of ours against a peer's; the ratio says how many times faster we are, by the best round of each."""
    return Result(
        id=key, kind="bench", method=page, what=what, unit=unit, target=target, peer=peer, values=ours, peer_values=theirs,
        seeds=range(len(ours)), ratio=min(theirs) / min(ours), settings=settings,
    )  # fmt: skip


BENCHES: dict[str, Callable[[Setting], None]] = {
    "help": help_seconds,
    "wanda": lambda setting: prune(setting, "wanda", 4),
    "sparsegpt": lambda setting: prune(setting, "sparsegpt", 3),
    "full": lambda setting: training(setting, "full", "peer_trainer.py", "transformers' Trainer", 1.2),
    "lora": lambda setting: training(setting, "lora", "peer_peft.py", "peft in a plain loop", 1.7),
    "perp-norms": lambda setting: perp(setting, "norms"),
    "perp-mask_lora": lambda setting: perp(setting, "mask_lora"),
}


def main() -> None:
    """Runs the benches that are named, or all."""
    names = sys.argv[1:] or list(BENCHES)
    print(f"{machine.hardware(torch.device('cpu'))}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder))
        for name in names:
            BENCHES[name](setting)


if __name__ == "__main__":
    main()
