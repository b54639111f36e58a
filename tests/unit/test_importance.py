"""Scores against the closed formula on stored activations; what is kept follows from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul import artifact, importance, journal
from overhaul.cut import NOBODY
from overhaul.errors import UserError
from overhaul.importance import How, OverWindows, Scores, choose, highest, over_tokens, score
from overhaul.shapes import Shape

HOWS = get_args(How)
SHAPE = Shape(layers=2, hidden=64, ffn=128, heads=4, kv_groups=2)
HEAD_DIM = 16
IDS = torch.randint(0, 500, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny: Path) -> nn.Module:
    return artifact.load(tiny).model


def batches(size: int, mask_BT: Tensor | None = None) -> list[dict[str, Tensor]]:
    made = [{"input_ids": ids} for ids in IDS.split(size)]
    if mask_BT is not None:
        for batch, mask in zip(made, mask_BT.split(size), strict=True):
            batch["attention_mask"] = mask
    return made


def stored(model: nn.Module) -> dict[str, np.ndarray]:
    """Every activation that is scored, (B, T, I), of one pass over all windows."""
    seen: dict[str, np.ndarray] = {}

    def keep(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.detach().double().numpy()

    handles = []
    for layer, block in enumerate(model.get_submodule("model.layers").children()):
        for name, module in (("mlp", block.mlp.down_proj), ("attention", block.self_attn.o_proj)):
            handles.append(module.register_forward_pre_hook(lambda _, a, k=f"{name}.{layer}": keep(k, a[0])))
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = block.get_submodule(name)
            handles.append(norm.register_forward_hook(lambda _, __, out, k=f"{name}.{layer}": keep(k, out)))
        handles.append(block.register_forward_pre_hook(lambda _, a, k=f"in.{layer}": keep(k, a[0])))
        handles.append(block.register_forward_hook(lambda _, __, out, k=f"out.{layer}": keep(k, out)))
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen


def formula(a_BTI: np.ndarray, over_batch: str, over_sequence: str) -> np.ndarray:
    """Element by element, in Python's own loops and fp64."""
    sizes = {
        "mean": lambda values: sum(abs(v) for v in values) / len(values),
        "l2": lambda values: math.sqrt(sum(v * v for v in values)),
        "variance": lambda values: sum((v - sum(values) / len(values)) ** 2 for v in values) / len(values),
    }
    num_elements = a_BTI.shape[-1]
    return np.array([
        sizes[over_batch]([sizes[over_sequence](window[:, i].tolist()) for window in a_BTI])
        for i in range(num_elements)
    ])  # fmt: skip


def close(ours: Tensor, theirs: Any) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(np.asarray(theirs)).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("over_batch", HOWS)
@pytest.mark.parametrize("over_sequence", HOWS)
def test_scores_are_the_formula_on_stored_activations(model: nn.Module, over_batch: How, over_sequence: How):
    scores = score(model, batches(2), over_batch=over_batch, over_sequence=over_sequence)

    seen = stored(model)
    of = {name: formula(a_BTI, over_batch, over_sequence) for name, a_BTI in seen.items()}
    for layer in range(2):
        close(scores.ffn_LF[layer], of[f"mlp.{layer}"])
        heads = of[f"attention.{layer}"].reshape(4, HEAD_DIM)
        close(scores.head_LH[layer], np.sqrt((heads**2).sum(1)))
        # Heads 0 and 1 share the first key and value.
        close(scores.group_LG[layer], np.sqrt([(heads[:2] ** 2).sum(), (heads[2:] ** 2).sum()]))
    norms = [of[f"{name}.{layer}"] for name in ("input_layernorm", "post_attention_layernorm") for layer in range(2)]
    close(scores.hidden_D, sum(norms))


def test_block_importance_is_one_minus_the_mean_cosine(model: nn.Module):
    scores = score(model, batches(2))

    seen = stored(model)
    for layer in range(2):
        before, after = torch.from_numpy(seen[f"in.{layer}"]), torch.from_numpy(seen[f"out.{layer}"])
        close(scores.block_L[layer], 1 - float(F.cosine_similarity(before, after, dim=-1).mean()))


def test_how_windows_are_batched_does_not_matter(model: nn.Module):
    one, all_at_once = score(model, batches(1)), score(model, batches(5))

    for first, second in zip(vars_of(one), vars_of(all_at_once), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def vars_of(scores: Scores) -> list[Tensor]:
    return [scores.ffn_LF, scores.head_LH, scores.group_LG, scores.hidden_D, scores.block_L]


def test_padding_does_not_count(model: nn.Module):
    mask_BT = torch.ones_like(IDS)
    mask_BT[:, 8:] = 0  # at the end, where it changes nothing of what comes before
    mask_BT[3] = 0

    padded = score(model, batches(5, mask_BT))

    plain = score(model, [{"input_ids": IDS[[0, 1, 2, 4], :8]}])
    for first, second in zip(vars_of(padded), vars_of(plain), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_nothing_but_padding_is_refused(model: nn.Module):
    with pytest.raises(UserError, match="no token that is not padding"):
        score(model, batches(5, torch.zeros_like(IDS)))


def test_scoring_leaves_the_model_alone(model: nn.Module):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    score(model, batches(5))

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sizes_of_a_window_by_hand():
    a_BTI = torch.tensor([[[3.0, -1.0], [-4.0, 1.0]]])

    assert over_tokens(a_BTI, "mean").tolist() == [[3.5, 1.0]]
    assert over_tokens(a_BTI, "l2").tolist() == [[5.0, pytest.approx(math.sqrt(2))]]
    assert over_tokens(a_BTI, "variance").tolist() == [[12.25, 1.0]]


@pytest.mark.parametrize(("how", "expected"), [("mean", 2.0), ("l2", math.sqrt(14)), ("variance", 2 / 3)])
def test_sizes_of_windows_are_added_batch_by_batch(how: How, expected: float):
    sums = OverWindows(how)
    sums.add(torch.tensor([[1.0], [2.0]]))
    sums.add(torch.tensor([[3.0]]))

    assert float(sums.result()) == pytest.approx(expected)


# What is kept.


def test_the_highest_stay_in_their_order_and_of_equals_the_first():
    assert highest(torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0]), 3).tolist() == [1, 2, 3]


def scored(shape: Shape, **given: Tensor) -> Scores:
    layers = shape.layers
    plain: dict[str, Tensor] = {
        "ffn_LF": torch.arange(shape.ffn).float().repeat(layers, 1),
        "head_LH": torch.arange(shape.heads).float().repeat(layers, 1),
        "group_LG": torch.arange(shape.kv_groups).float().repeat(layers, 1),
        "hidden_D": torch.arange(shape.hidden).float(),
        "block_L": torch.arange(layers).float(),
    }
    return Scores(**plain | given)


def test_each_layer_keeps_its_own_neurons_and_heads():
    source = Shape(layers=3, hidden=4, ffn=4, heads=6, kv_groups=2)
    target = Shape(layers=2, hidden=2, ffn=2, heads=2, kv_groups=1)
    scores = scored(
        source,
        ffn_LF=torch.tensor([[4.0, 3, 2, 1], [0, 0, 0, 0], [1, 4, 1, 4]]),
        group_LG=torch.tensor([[1.0, 2], [0, 0], [2, 1]]),
        head_LH=torch.tensor([[9.0, 9, 9, 1, 3, 2], [0] * 6, [1, 3, 2, 9, 9, 9]]),
        hidden_D=torch.tensor([1.0, 4, 2, 3]),
    )

    kept = choose(scores, source, target, torch.tensor([0, 2]))

    assert kept.ffn_LF.tolist() == [[0, 1], [1, 3]]
    assert kept.hidden_D.tolist() == [1, 3]
    assert kept.groups_LG.tolist() == [[1], [0]]
    assert kept.heads_LGK.tolist() == [[[4, 5]], [[1, 2]]]
    assert kept.partners_LGK is None
    assert kept.shape == target


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        # Sorted by score: 1, 3, 0, 4, 2. The last that stays takes over from the first that goes, and so on outwards.
        (4, {4: 2}),
        (3, {0: 4, 3: 2}),
        (2, {3: 0, 1: 4}),  # head 2 has no partner: there are more removed heads than kept ones
        (1, {1: 3}),
        (5, {}),
    ],
)
def test_head_residual_pairs_by_hand(keep: int, expected: dict[int, int]):
    source = Shape(layers=1, hidden=2, ffn=2, heads=5, kv_groups=1)
    scores = scored(source, head_LH=torch.tensor([[3.0, 9.0, 1.0, 5.0, 2.0]]))

    kept = choose(
        scores, source, Shape(layers=1, hidden=2, ffn=2, heads=keep, kv_groups=1), torch.tensor([0]), residual=True
    )

    assert kept.partners_LGK is not None
    pairs = zip(kept.heads_LGK.flatten().tolist(), kept.partners_LGK.flatten().tolist(), strict=True)
    assert {head: partner for head, partner in pairs if partner != NOBODY} == expected


def test_without_groups_all_heads_are_partners():
    source = Shape(layers=1, hidden=2, ffn=2, heads=4, kv_groups=4)
    scores = scored(source, group_LG=torch.tensor([[3.0, 9.0, 1.0, 5.0]]))

    target = Shape(layers=1, hidden=2, ffn=2, heads=3, kv_groups=3)
    kept = choose(scores, source, target, torch.tensor([0]), residual=True)

    # Sorted by score: 1, 3, 0, 2.
    assert kept.heads_LGK.flatten().tolist() == [0, 1, 3]
    assert kept.partners_LGK is not None
    assert kept.partners_LGK.flatten().tolist() == [2, NOBODY, NOBODY]


# Beside the weights.

SOURCE = importance.Source(
    weights_sha256="abc", corpus="def", samples=3, seq_len=12, over_batch="l2", over_sequence="mean"
)
HOW: dict[str, How] = {"over_batch": "l2", "over_sequence": "mean"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with journal.recording() as notes:
        importance.note(scored(SHAPE), SOURCE)
    (written,) = notes.tensors
    save_file(dict(written.tensors), tmp_path / written.file, metadata=dict(written.metadata))
    return tmp_path


def test_scores_come_back_as_they_were_written(directory: Path):
    scores, source = importance.read(directory, weights_sha256="abc", **HOW)

    assert source == SOURCE
    assert all(torch.equal(a, b) for a, b in zip(vars_of(scores), vars_of(scored(SHAPE)), strict=True))
    assert scores.skipped_L is None


def test_scores_of_other_weights_are_refused(directory: Path):
    with pytest.raises(UserError, match="other weights"):
        importance.read(directory, weights_sha256="xyz", **HOW)


def test_scores_put_together_in_another_way_are_refused(directory: Path):
    with pytest.raises(UserError, match="l2 over windows of mean") as refused:
        importance.read(directory, weights_sha256="abc", over_batch="mean", over_sequence="mean")

    assert "--over-batch l2" in refused.value.hint


def test_a_directory_without_scores_and_a_damaged_file_are_refused(directory: Path):
    path = directory / artifact.IMPORTANCE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        importance.read(directory, weights_sha256="abc", **HOW)
    path.unlink()
    with pytest.raises(UserError, match="holds no importance"):
        importance.read(directory, weights_sha256="abc", **HOW)
