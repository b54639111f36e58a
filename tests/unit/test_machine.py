from __future__ import annotations

import mmap
import random

import numpy as np
import pytest
import torch

from overhaul import machine
from overhaul.errors import UserError


def test_devices():
    assert machine.pick_device("cpu") == torch.device("cpu")
    assert machine.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="unknown"):
        machine.pick_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="--device cpu"):
        machine.pick_device("cuda:1")


def test_precision_by_name():
    cpu = torch.device("cpu")

    assert machine.compute_dtype("fp32", cpu) == torch.float32
    assert machine.compute_dtype("bf16", cpu) == torch.bfloat16
    assert machine.compute_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("processor", "tiles", "instructions", "dtype"),
    [
        ("Intel(R) Xeon(R)", True, True, torch.bfloat16),
        ("Intel(R) Xeon(R)", False, True, torch.float32),
        ("AMD EPYC", False, True, torch.bfloat16),
        ("AMD EPYC", False, False, torch.float32),
    ],
)
def test_auto_takes_the_faster_products_of_a_processor(
    monkeypatch: pytest.MonkeyPatch, processor: str, tiles: bool, instructions: bool, dtype: torch.dtype
):
    monkeypatch.setattr(machine, "_cpu_name", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)

    assert machine.compute_dtype("auto", torch.device("cpu")) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_the_given_type(dtype: torch.dtype):
    with machine.autocast(torch.device("cpu"), dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds_reach_every_generator_and_states_come_back():
    machine.seed_everything(5)
    first = drawn()
    state = machine.rng_state()
    second = drawn()

    machine.seed_everything(5)
    assert drawn() == first
    machine.set_rng_state(state)
    assert drawn() == second


def test_peak_memory_is_of_what_came_after_the_reset():
    machine.reset_peak_rss()
    before = machine.peak_rss_bytes()
    # Pages of its own: an array might lie in memory that earlier tests freed and the allocator kept.
    with mmap.mmap(-1, 20_000_000) as held:
        held.write(b"x" * 20_000_000)

        assert machine.peak_rss_bytes() >= before + 15_000_000


def test_versions_and_hardware_are_told():
    assert {"python", "overhaul", "torch", "transformers"} <= machine.versions().keys()
    assert "GB" in machine.hardware(torch.device("cpu"))
    assert machine.free_bytes() > 0
