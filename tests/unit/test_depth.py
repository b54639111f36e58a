"""Which layers stay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overhaul import artifact, evaluate, journal
from overhaul.depth import Depth, rises_without, skipping
from overhaul.importance import Scores
from overhaul.interop import decoder

WINDOWS = torch.randint(0, 500, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny: Path) -> nn.Module:
    return artifact.load(tiny).model


def scored(block_L: list[float], skipped_L: list[float] | None = None) -> Scores:
    none = torch.zeros(0)
    skipped = None if skipped_L is None else torch.tensor(skipped_L)
    plain: dict[str, Any] = dict.fromkeys(("ffn_LF", "head_LH", "group_LG", "hidden_D"), none)
    return Scores(**plain, block_L=torch.tensor(block_L), skipped_L=skipped)


def never() -> Tensor:
    raise AssertionError("no text is needed")


def test_a_skipped_layer_is_one_that_is_not_there(model: Any):
    without = artifact.load(model.name_or_path).model
    del without.model.layers[0]
    without.config.num_hidden_layers = 1
    without.model.config.num_hidden_layers = 1

    with skipping(model, [0]), torch.no_grad():
        skipped = model(WINDOWS, use_cache=False).logits

    with torch.no_grad():
        assert torch.equal(skipped, without(WINDOWS, use_cache=False).logits)
        assert not torch.equal(skipped, model(WINDOWS, use_cache=False).logits)


def test_the_rise_is_that_of_perplexity(model: nn.Module):
    rises = rises_without(model, WINDOWS, [range(0, 1), range(0, 2), range(0)])

    whole = evaluate.perplexity(model, WINDOWS).estimate.value
    with skipping(model, [0, 1]):
        both = evaluate.perplexity(model, WINDOWS).estimate.value
    assert float(rises[1]) == pytest.approx(both - whole)
    assert float(rises[2]) == 0
    assert math.isfinite(float(rises[0]))


def test_the_layers_that_change_least_go(model: nn.Module):
    depth = Depth(model, scored([0.9, 0.1, 0.3, 0.1, 0.5]), by="block", windows=never)

    assert depth.kept(5).tolist() == [0, 1, 2, 3, 4]
    assert depth.kept(3).tolist() == [0, 2, 4]
    assert depth.kept(1).tolist() == [0]


def test_the_layers_that_perplexity_needs_least_go(model: nn.Module):
    asked = []

    def windows() -> Tensor:
        asked.append(1)
        return WINDOWS

    depth = Depth(model, scored([0.9, 0.1]), by="perplexity", windows=windows)

    rises = rises_without(model, WINDOWS, [range(0, 1), range(1, 2)])
    assert depth.kept(1).tolist() == [int(rises.argmax())]
    assert depth.kept(1).tolist() == [int(rises.argmax())]
    assert len(asked) == 1, "measured once"
    assert depth.scores.skipped_L is not None
    torch.testing.assert_close(depth.scores.skipped_L, rises)


def test_rises_that_are_stored_are_not_measured_again(model: nn.Module):
    depth = Depth(model, scored([0.9, 0.1, 0.2], [0.1, 5.0, -0.2]), by="perplexity", windows=never)

    assert depth.kept(1).tolist() == [1]


def test_one_range_goes(model: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "overhaul.depth.rises_without",
        lambda *_, **__: torch.tensor([3.0, 1.0, 2.0]),  # of layers 0-2, 1-3, 2-4
    )
    depth = Depth(model, scored([0.1] * 5), by="contiguous", windows=lambda: WINDOWS)

    assert depth.kept(2).tolist() == [0, 4]


def test_the_report_says_which_layers_went(model: nn.Module):
    depth = Depth(model, scored([0.9, 0.1, 0.3]), by="block", windows=never)

    with journal.recording() as notes:
        depth.note(3)
        depth.note(2)

    (table,) = notes.tables
    assert table.title == "The layers that matter least were cut: 1"
    assert table.columns == ("layer", "block importance", "")
    assert table.rows == (("0", "0.9000", "stays"), ("1", "0.1000", "cut"), ("2", "0.3000", "stays"))


def test_nothing_is_left_changed(model: nn.Module):
    with skipping(model, [1]):
        pass

    assert not any("forward" in vars(block) for block in decoder.find(model).blocks)
