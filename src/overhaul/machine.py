"""This machine: device, precision, memory, versions."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import os
import platform
import random
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from overhaul.errors import UserError

DtypeName = Literal["auto", "fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes a GPU when there is one.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # each process of a node its own GPU
        return torch.device(own if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is unknown", allowed="auto, cpu, cuda, cuda:N, mps")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[name.split(":")[0]]:
        raise UserError(
            f"this machine, or this build of torch, has no {name}", allowed="auto, cpu", hint="--device cpu"
        )
    return torch.device(name)


def compute_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The type of matrix products: `auto` takes bf16 where the hardware multiplies it faster than fp32, else fp32."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = device.type == "cpu" and _cpu_multiplies_bf16_faster()
    return torch.bfloat16 if fast else torch.float32


def _cpu_multiplies_bf16_faster() -> bool:
    """Intel has AVX512's bf16 instructions too, but without AMX's tiles they take up to twice the time of fp32 there;
    on AMD (Zen 4) products take 0.45 times, a whole training step 0.55 times."""
    amd = _cpu_name().startswith("AMD")
    return torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_bf16_supported())


def weights_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The type of weights in memory for products in `dtype`: that on disk (None), unless there is no autocast."""
    return torch.float32 if dtype == torch.float32 else None


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in `dtype`; nothing to do for fp32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products with `x` run in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*told: object) -> int:
    """A seed of 32 bits that follows from some things alone, whatever was drawn before."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, told)).encode()).digest()[:4], "big")


def now() -> str:
    """The time, UTC, to the second, as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def rng_state() -> dict[str, Any]:
    """The state of all random generators, to be given to `set_rng_state`."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Takes over what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def reset_peak_rss() -> None:
    """Starts a new high-water mark of resident memory, where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Highest resident memory since `reset_peak_rss`, or since the process began where that is not to be had."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Gives freed memory back to the system; glibc would keep what many short-lived tensors of one size took."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_bytes() -> int:
    """Memory that can be used without swapping."""
    return psutil.virtual_memory().available


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    names = ("overhaul", "torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def hardware(device: torch.device) -> str:
    """One line on what the run used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, {psutil.virtual_memory().total / 1e9:.0f} GB"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
