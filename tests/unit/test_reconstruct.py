"""Layer-wise reconstruction: blocks of a pruned model against those of the dense one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from overhaul import artifact
from overhaul.adapt.perp import Perp
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.errors import UserError
from overhaul.journal import recording
from overhaul.prune.magnitude import Magnitude
from overhaul.reconstruct import reconstruction_plans
from overhaul.train import train

SMALL: dict[str, Any] = {"samples": 4, "seq_len": 16, "batch_size": 2, "steps": 20, "lr": 1e-2, "reconstruct": True}


@pytest.fixture
def models(tiny: Path) -> tuple[Any, Any]:
    """The dense model and its pruned copy."""
    dense = artifact.load(tiny).model
    with recording(), torch.no_grad():
        return dense, Magnitude(sparsity=0.5).apply(copy.deepcopy(dense), None)


@pytest.fixture
def data(tiny: Path, models: tuple[Any, Any]) -> Data:
    state = models[0].state_dict()

    def dense_tensors(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

    corpus = open_corpus(CorpusSpec(path="sample"))
    return Data(corpus, AutoTokenizer.from_pretrained(tiny), dense_tensors=dense_tensors)


def test_the_targets_are_the_dense_block_s_outputs(models: tuple[Any, Any], data: Data):
    dense, pruned = models
    method = Perp.model_validate(SMALL)

    plan = next(reconstruction_plans(pruned, data, method))

    ids_NT = data.calibration(samples=4, seq_len=16)
    inputs_NTD = torch.cat([pruned.model.embed_tokens(batch["input_ids"]) for batch in ids_NT])
    positions = pruned.model.rotary_emb(inputs_NTD, torch.arange(16)[None])
    with torch.no_grad():
        outputs_NTD = dense.model.layers[0](inputs_NTD, position_embeddings=positions)
    seen = [next(plan.stream) for _ in range(2)]  # two batches of two: every window once, in a seeded order
    for x_TD, y_TD in zip(*(torch.cat([b[key] for b in seen]) for key in ("inputs", "targets")), strict=True):
        which = (inputs_NTD - x_TD).abs().amax((1, 2)).argmin()
        torch.testing.assert_close(y_TD, outputs_NTD[which], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["block", "attn_mlp", "matrix"])
def test_the_error_of_every_part_falls(models: tuple[Any, Any], data: Data, granularity: str):
    method = Perp.model_validate({**SMALL, "granularity": granularity, "train": ("norms", "mask_lora")})
    _, pruned = models

    with recording() as notes:
        for plan in method.stages(pruned, data):
            train(plan, method, quiet=True)
            plan.model.requires_grad_(False)
            with torch.no_grad():
                plan.finish(plan.model)

    assert len(notes.parts) == {"block": 2, "attn_mlp": 4, "matrix": 14}[granularity]
    for part in notes.parts:
        assert part.before > 0
        assert part.after < part.before, part


def test_without_the_dense_model_it_is_refused(tiny: Path, models: tuple[Any, Any]):
    data = Data(open_corpus(CorpusSpec(path="sample")), AutoTokenizer.from_pretrained(tiny))

    with pytest.raises(UserError, match="needs the dense model"):
        next(reconstruction_plans(models[1], data, Perp.model_validate(SMALL)))
