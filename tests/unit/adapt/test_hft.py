"""Half Fine-Tuning: the frozen half to the bit, what the optimizer holds, the view as a penalty, draws, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from command import overhaul, refused
from overhaul import artifact
from overhaul.adapt.hft import HalfFineTuning
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.halves import train_half
from overhaul.objective import Anchor, Forward
from overhaul.train import History, Plan, train
from overhaul.watch import Moments

SHORT = ("--data", "sample", "--steps", "2", "--batch-size", "2", "--seq-len", "32", "--evaluate", "none",
         "--dtype", "fp32")  # fmt: skip
SETTINGS: dict[str, Any] = {"steps": 2, "batch_size": 2, "seq_len": 32, "lr": 1e-3}


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """The names of the tensors that differ in any bit."""
    old, new = weights(before), weights(after)
    return {
        name for name, tensor in old.items() if not torch.equal(tensor.view(torch.uint8), new[name].view(torch.uint8))
    }


def hft(model: Path, out: Path, *flags: object) -> Path:
    done = overhaul("adapt", "hft", model, "-o", out, *SHORT, "--lr", "1e-3", *flags)
    assert done.code == 0, done.err
    return out


def drawn(model: Path, number: int, **fields: Any) -> set[str]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    return set(train_half(loaded, HalfFineTuning(**fields), seed=0, draw=number).names)


@pytest.fixture
def data(tiny: Path) -> Data:
    return Data(open_corpus(CorpusSpec(path="sample")), artifact.load(tiny).processor)


def run(tiny: Path, data: Data, **fields: Any) -> tuple[nn.Module, list[Plan], History]:
    method, model = HalfFineTuning(**SETTINGS, **fields), artifact.load(tiny).model
    plans, histories = [], []
    for plan in method.stages(model, data):
        plans.append(plan)
        histories.append(train(plan, method, quiet=True))
    return model, plans, History.joined(histories)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [(), ("--freeze-embeddings", "--freeze-final-norm")], ids=["", "frozen"])
def test_the_frozen_half_is_the_same_to_the_bit(
    make_tiny: Callable[..., Path], tmp_path: Path, dtype: str, flags: tuple[str, ...]
):
    parent = make_tiny(dtype=dtype)
    out = hft(parent, tmp_path / "out", "--weight-decay", "0.1", "--lr", "0.1", *flags)

    fields = {flag.removeprefix("--").replace("-", "_"): True for flag in flags}
    assert changed(parent, out) == drawn(parent, 1, **fields)


def test_each_round_trains_another_half_and_a_later_step_goes_on_with_the_next(tiny: Path, tmp_path: Path):
    first = hft(tiny, tmp_path / "first", "--rounds", "2")
    second = hft(first, tmp_path / "second")

    assert changed(tiny, first) == drawn(tiny, 1) | drawn(tiny, 2)
    assert changed(first, second) == drawn(tiny, 3)
    assert len({frozenset(drawn(tiny, number)) for number in (1, 2, 3)}) == 3
    points = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [(point["stage"], point["step"], point["tokens"]) for point in points] == [
        (1, 1, 64), (1, 2, 128), (2, 3, 192), (2, 4, 256),
    ]  # fmt: skip
    assert points[-1]["seconds"] >= points[1]["seconds"]


def test_rounds_go_through_the_text_one_after_the_other(tiny: Path, data: Data):
    once = HalfFineTuning(**SETTINGS)
    model = artifact.load(tiny).model
    (plan,) = once.stages(model, data)
    expected = [next(plan.stream)["input_ids"] for _ in range(4)]

    stages = HalfFineTuning(**SETTINGS, rounds=2).stages(model, data)
    seen = [next(stage.stream)["input_ids"] for stage in stages for _ in range(2)]

    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


def test_optimizer_and_gradients_are_there_for_the_trained_half_only(tiny: Path, data: Data):
    model, (plan,), history = run(tiny, data)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = [value for state in plan.optimizer.state.values() for key, value in state.items() if key != "step"]
    assert sum(value.nbytes for value in moments) == 2 * 4 * sum(p.numel() for p in trained)
    assert history.trainable_parameters == sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters())
    assert [p.grad is not None for p in model.parameters()] == [p.requires_grad for p in model.parameters()]


def test_recomputed_activations_give_the_same_where_the_first_block_is_frozen(tiny: Path, tmp_path: Path):
    """The checkpointed block then has no input with a gradient."""
    flags = ("--level", "layer", "--freeze-embeddings")
    seed = next(seed for seed in range(9) if not any(".layers.0." in name for name in _layer_draw(tiny, seed)))
    plain, recomputed = (
        hft(tiny, tmp_path / name, *flags, "--seed", seed, *more)
        for name, more in (("plain", ()), ("recomputed", ("--checkpoint-activations",)))
    )

    assert changed(tiny, recomputed) == changed(tiny, plain) == _layer_draw(tiny, seed)
    for name, tensor in weights(plain).items():
        assert_close(weights(recomputed)[name], tensor, rtol=1e-5, atol=1e-6)


def _layer_draw(model: Path, seed: int) -> set[str]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    choice = HalfFineTuning(level="layer", freeze_embeddings=True)
    return set(train_half(loaded, choice, seed=seed, draw=1).names)


@pytest.mark.parametrize("keep", [False, True])
def test_moments_are_dropped_or_kept_at_a_new_draw(tiny: Path, data: Data, keep: bool):
    method, steps = HalfFineTuning(**SETTINGS, rounds=2, keep_moments=keep), []
    for plan in method.stages(artifact.load(tiny).model, data):
        train(plan, method, quiet=True)
        steps.append({float(state["step"]) for state in plan.optimizer.state.values()})

    assert steps == [{2.0}, {2.0, 4.0} if keep else {2.0}]


# HFT as the limit of a penalty: min L(theta) + lambda ||(I - M)(theta - theta_0)||^2.


class Numbers(nn.Module):
    """Parameters of one number each, so that any mask can be drawn."""

    def __init__(self, values_P: Tensor) -> None:
        super().__init__()
        self.of = nn.ParameterList(nn.Parameter(value) for value in values_P)


@pytest.fixture
def problem() -> dict[str, Tensor]:
    """Least squares in R^20 with a random half held at a random start, in fp64."""
    torch.manual_seed(0)
    x_NP, y_N, start_P = (torch.randn(*shape, dtype=torch.float64) for shape in ((40, 20), (40,), (20,)))
    return {"x_NP": x_NP, "y_N": y_N, "start_P": start_P, "trained_P": torch.randperm(20) < 10}


def solved(weight: float, x_NP: Tensor, y_N: Tensor, start_P: Tensor, trained_P: Tensor) -> Tensor:
    """The minimum of ||X theta - y||^2 + weight * ||(I - M)(theta - theta_0)||^2."""
    held_PP = weight * torch.diag((~trained_P).double())
    return torch.linalg.solve(x_NP.T @ x_NP + held_PP, x_NP.T @ y_N + held_PP @ start_P)


def half_solved(x_NP: Tensor, y_N: Tensor, start_P: Tensor, trained_P: Tensor) -> Tensor:
    """The minimum over the trained half, the other one at its start."""
    theta_P = start_P.clone()
    left_N = y_N - x_NP[:, ~trained_P] @ start_P[~trained_P]
    theta_P[trained_P] = torch.linalg.lstsq(x_NP[:, trained_P], left_N.unsqueeze(1)).solution.squeeze(1)
    return theta_P


def test_training_a_half_is_the_limit_of_the_penalty(problem: dict[str, Tensor]):
    def loss(theta_P: Tensor) -> float:
        return float((problem["x_NP"] @ theta_P - problem["y_N"]).square().sum())

    half_P = half_solved(**problem)
    gaps = [float((solved(weight, **problem) - half_P).abs().max()) for weight in (1e2, 1e4, 1e10)]

    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6
    assert loss(half_P) >= loss(solved(1e2, **problem)) >= loss(solved(0.0, **problem))


@pytest.mark.parametrize("weight", [0.3, 50.0])
def test_the_anchor_has_the_gradient_of_that_penalty(problem: dict[str, Tensor], weight: float):
    """Where the penalised problem has its minimum, the two gradients cancel."""
    model = Numbers(solved(weight, **problem))
    held = {f"of.{place}": problem["start_P"][place] for place in (~problem["trained_P"]).nonzero().flatten().tolist()}
    theta_P = torch.stack(list(model.of))
    squares = (problem["x_NP"] @ theta_P - problem["y_N"]).square().sum()

    (squares + weight * Anchor(held).total(Forward(model, {}), {})).backward()

    gradient_P = torch.stack([parameter.grad for parameter in model.of if parameter.grad is not None])
    assert_close(gradient_P, torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_soft_half_moves_less_the_harder_it_is_held(tiny: Path, data: Data):
    before = artifact.load(tiny).model.state_dict()
    moved = {}
    for weight in (1e-6, 1e2, 1e6):
        model, _, _ = run(tiny, data, soft=weight, clip=0)
        rest = {n: p.detach() for n, p in model.named_parameters() if ".layers." in n and n not in drawn(tiny, 1)}
        moved[weight] = sum(float((p - before[n]).square().sum()) for n, p in rest.items())

    assert moved[1e-6] > moved[1e2] > 0
    assert moved[1e-6] > moved[1e6] > 0


def test_accumulated_batches_are_held_as_much_as_one_large_one(tiny: Path, data: Data):
    losses = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        how = {**SETTINGS, "batch_size": batch_size, "steps": 3}
        method, model = HalfFineTuning(**how, accumulate=accumulate, soft=10.0, clip=0), artifact.load(tiny).model
        history = train(method.plan(model, data), method, quiet=True)
        losses.append([point["loss/anchor"] for point in history.points])

    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] == 0 < losses[0][1]


# Mistakes.


@pytest.mark.parametrize(("flags", "says"), [
    (("--share", "0"), "greater than 0"),
    (("--share", "1.5"), "less than or equal to 1"),
    (("--share", "0.2"), "none of the 4 norm matrices"),
    (("--rounds", "0"), "greater than 0"),
    (("--soft", "0"), "greater than 0"),
    (("--soft", "1"), "use clip 0, not 1"),
    (("--freeze-head",), "tied to the embedding"),
])  # fmt: skip
def test_fields_out_of_range(tiny: Path, tmp_path: Path, flags: tuple[str, ...], says: str):
    refused(overhaul("adapt", "hft", tiny, "-o", tmp_path / "out", *SHORT, *flags), says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [("--soft", "1", "--clip", "0"), ("--keep-moments",)])
def test_sharded_parameters_are_refused_where_whole_ones_are_needed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused(overhaul("adapt", "hft", tiny, "-o", tmp_path / "out", *SHORT, *flags), flags[0], "FSDP")


def test_moments_that_rested_in_a_checkpoint_come_back_to_their_parameters_device():
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    holder = nn.ParameterDict({"w": parameter})
    moments = Moments()
    moments.load_state_dict({"resting": {"w": {"step": torch.ones(()), "exp_avg": torch.ones(2)}}})

    moments.hand_over(holder, rule := torch.optim.AdamW([parameter]))

    assert {value.device.type for value in rule.state[parameter].values()} == {"meta"}
