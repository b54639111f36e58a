"""A teacher's likeliest words, computed once and kept on disk: the next student needs no teacher in memory.

A file holds one micro-batch. Its name is a hash of everything that it depends on: the teacher's weights, the tokens
that it read, how many words are kept, the temperature, the precision, and the version of this code. So whatever is
found is right, in whatever order it is asked for, and a run that was killed goes on with what it had.

Shapes: B windows, T tokens in a window, K words of V.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from overhaul import disk
from overhaul.divergence import TeacherLinear, TeacherLogits, TopWords, top_words
from overhaul.errors import UserError
from overhaul.fetch import cache_directory
from overhaul.interop import hf
from overhaul.interop.fused import fused
from overhaul.objective import predicting

_FORMAT = 1
"""Goes up when what is in a file, or the arithmetic that makes it, changes."""

_NARROW_WORDS = 2**16
"""So many words have numbers of two bytes."""

_IDS, _LOG_PROBS, _LOG_TAIL = "teacher_ids", "teacher_log_probs", "teacher_log_tail"


class TeacherCache:
    """The likeliest words of one teacher.

    Args:
        load: gives the teacher, frozen, when something is not on disk yet.
        teacher_sha256: hash of its weights.
        dtype: of its weights in memory, and so of its products.
        top_k: words kept for each token.
        num_words: probabilities are over the first so many words.
        temperature: at which they are kept: a tail has no temperature of its own.
        directory: where; default is below the user's cache.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        *,
        teacher_sha256: str,
        dtype: torch.dtype,
        top_k: int,
        num_words: int,
        temperature: float = 1.0,
        directory: Path | None = None,
    ) -> None:
        self.load, self.top_k, self.num_words, self.temperature = load, top_k, num_words, temperature
        self.directory = directory or cache_directory() / "teachers" / teacher_sha256[:16]
        self._teacher: nn.Module | None = None
        self._depends_on = {
            "format": _FORMAT,
            "overhaul": version("overhaul"),
            "teacher": teacher_sha256,
            "dtype": str(dtype),
            "top_k": top_k,
            "num_words": num_words,
            "temperature": temperature,
        }

    def num_bytes(self, tokens: int) -> int:
        """What the words of so many tokens take on disk."""
        return tokens * (self.top_k * (4 + _ids_dtype(self.num_words).itemsize) + 4)

    def refuse_full_disk(self, tokens: int) -> None:
        """Raises `UserError` when the disk has no room for the words of so many tokens."""
        self.directory.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))
        free, needed = shutil.disk_usage(self.directory).free, self.num_bytes(tokens) - there
        if free < needed:
            raise UserError(
                f"the teacher's {self.top_k} likeliest words of {tokens:,} tokens need {needed / 1e6:.0f} MB, and "
                f"{self.directory} has {free / 1e6:.0f} MB free",
                hint="a smaller --top-k, or $OVERHAUL_CACHE on a larger disk",
            )

    def with_words(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A micro-batch and, for each place that predicts a token, the words (B, T - 1, K) that the teacher expects."""
        path = self._path(batch)
        found = self._read(path)
        if found is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Every process of several draws every micro-batch: the first one to come computes it.
            with FileLock(self.directory / ".lock"):
                found = self._read(path) or self._write(path, batch)
        return {**batch, **found, _IDS: found[_IDS].to(torch.int64)}

    def words(self, batch: Mapping[str, Tensor]) -> TopWords:
        """What `with_words` put into a micro-batch, row by row as `predicting` has them."""
        ids_BTK, log_probs_BTK, log_tail_BT = batch[_IDS], batch[_LOG_PROBS], batch[_LOG_TAIL]
        return TopWords(ids_BTK.flatten(0, 1), log_probs_BTK.flatten(0, 1), log_tail_BT.flatten(), self.num_words)

    def _path(self, batch: Mapping[str, Tensor]) -> Path:
        digest = hashlib.sha256(json.dumps(self._depends_on, sort_keys=True).encode())
        for name in ("input_ids", "attention_mask"):
            if name in batch:
                tensor = batch[name].cpu().contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.numpy().tobytes())
        return self.directory / f"{digest.hexdigest()}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """What a file holds; None where there is none, or one that is damaged or was called so by somebody else."""
        with contextlib.suppress(FileNotFoundError, SafetensorError), safe_open(path, framework="pt") as opened:
            if (opened.metadata() or {}).get("key") == path.stem:
                return {name: opened.get_tensor(name) for name in (_IDS, _LOG_PROBS, _LOG_TAIL)}
        return None

    @torch.no_grad()
    def _write(self, path: Path, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._teacher is None:
            self._teacher = self.load()
        teacher = self._teacher
        device = next(teacher.parameters()).device
        with fused(teacher):
            made = hf.outputs(teacher, {name: tensor.to(device) for name, tensor in batch.items()})
        head = hf.head(teacher)
        if head is None:
            known: Any = TeacherLogits(predicting(made.logits))
        else:
            known = TeacherLinear(predicting(made.hidden), head.weight, head.bias)
        found = top_words(known, self.top_k, num_words=self.num_words, temperature=self.temperature)
        shape = (len(batch["input_ids"]), -1)
        tensors = {
            _IDS: found.ids_NK.to(_ids_dtype(self.num_words)).unflatten(0, shape).cpu(),
            _LOG_PROBS: found.log_probs_NK.float().unflatten(0, shape).cpu(),
            _LOG_TAIL: found.log_tail_N.float().unflatten(0, shape).cpu(),
        }
        metadata = {name: str(value) for name, value in self._depends_on.items()} | {"key": path.stem}
        aside = path.with_name(f".{path.stem}.partial-{os.getpid()}")
        with disk.refusals(path):
            save_file(tensors, aside, metadata=metadata)
            aside.replace(path)
        return tensors


def _ids_dtype(num_words: int) -> torch.dtype:
    return torch.uint16 if num_words <= _NARROW_WORDS else torch.int32
