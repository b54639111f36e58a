"""Banks: swapped without a copy, bit for bit what they were, added to and never changed, of one model only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from command import overhaul, refused
from images import write_bars, write_cnn
from overhaul import artifact, banks
from overhaul.banks import Banked, fingerprint
from overhaul.errors import UserError
from overhaul.kinds import Kind
from overhaul.sockets.reprogramming import Reprogramming


def cnn(directory: Path) -> nn.Module:
    return artifact.load(write_cnn(directory), kinds=(Kind.IMAGE_CLASSIFIER,)).model


def moved(banked: Banked, by: int) -> None:
    """Fills what is a task's own with other numbers, as training would."""
    torch.manual_seed(by)
    for parameter in banked.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)


def pixels(count: int = 4) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))}


def test_a_new_bank_changes_nothing_but_the_head(tmp_path: Path):
    model: Any = cnn(tmp_path / "cnn")
    before = model(**pixels(), output_hidden_states=True).hidden_states[-1]
    banked = Banked(model, Reprogramming())

    banked.begin(("a", "b", "c"))

    assert torch.equal(model(**pixels(), output_hidden_states=True).hidden_states[-1], before)
    assert model(**pixels()).logits.shape == (4, 3)


def test_a_bank_that_is_used_again_says_the_same_bits(tmp_path: Path):
    model: Any = cnn(tmp_path / "cnn")
    banked, said = Banked(model, Reprogramming()), []
    for number, classes in enumerate((("a", "b"), ("c", "d", "e"), ("f",))):
        banked.begin(classes)
        moved(banked, number)
        banked.keep(f"task {number}")
        said.append(model(**pixels()).logits)

    for number in (1, 0, 2, 0):
        banked.use(number)
        assert torch.equal(model(**pixels()).logits, said[number])
    assert banked.find("task 1") == 1
    with pytest.raises(UserError, match="no task 'task 9'"):
        banked.find("task 9")


def test_a_batch_may_hold_examples_of_several_tasks(tmp_path: Path):
    banked = Banked(cnn(tmp_path / "cnn"), Reprogramming())
    for number, classes in enumerate((("a", "b"), ("c", "d", "e"))):
        banked.begin(classes)
        moved(banked, number)
        banked.keep(f"task {number}")
    tasks = torch.tensor([1, 0, 0, 1])

    together = banked.logits(pixels(), tasks)

    for row, task in enumerate(tasks.tolist()):
        alone = banked.logits({"pixel_values": pixels()["pixel_values"][row : row + 1]}, torch.tensor([task]))[0]
        assert torch.allclose(together[row], alone, atol=1e-6)


def test_the_frozen_model_comes_out_as_it_went_in(tmp_path: Path):
    model: Any = cnn(tmp_path / "cnn")
    before, tensors, logits = fingerprint(model), list(model.state_dict()), model(**pixels()).logits
    banked = Banked(model, Reprogramming(behind="all", form="residual"))
    banked.begin(("a", "b", "c"))
    moved(banked, 0)
    banked.keep("task")

    assert banked.restore() is model
    assert list(model.state_dict()) == tensors
    assert fingerprint(model) == before == banked.fingerprint
    assert torch.equal(model(**pixels()).logits, logits)


RESNETS = {
    # depths, widths and kind of layer -> channels behind convolutions of more than one pixel, of normalisations, of
    # weights without the head, as the paper's networks have them
    "resnet50": (ResNetConfig(num_labels=10), 34_560, 106_240, 0.00599),
    "resnet18": (
        ResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2] * 4, layer_type="basic", num_labels=10
        ),
        3_904 * 9,
        4_800 * 4,
        0.00486,
    ),
}


@pytest.mark.parametrize("shape", RESNETS)
def test_a_bank_is_as_small_as_published(shape: str):
    config, kernels, norms, share = RESNETS[shape]
    with torch.device("meta"):
        model: Any = ResNetForImageClassification(config)
    backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier"))
    sockets = Reprogramming()
    sockets.fit(model)
    sizes = {name: banks._tensor(model, name).numel() for name in sockets.names(model) if "num_batches" not in name}

    assert sum(size for name, size in sizes.items() if name.endswith("kernel")) == kernels
    assert sum(size for name, size in sizes.items() if not name.endswith("kernel")) == norms
    assert (kernels + norms) / backbone == pytest.approx(share, abs=1e-5)


def test_behind_all_convolutions_a_bank_is_as_large_as_published():
    with torch.device("meta"):
        model: Any = ResNetForImageClassification(ResNetConfig())
    sockets = Reprogramming(behind="all")
    sockets.fit(model)

    names = [name for name in sockets.names(model) if "num_batches" not in name]
    assert sum(banks._tensor(model, name).numel() for name in names) == 345_280


def test_where_there_is_no_place_is_said(tmp_path: Path):
    linear = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match="has no convolutions"):
        Reprogramming().fit(linear)
    shared = nn.Conv2d(1, 1, 3)
    with pytest.raises(UserError, match="1 and 0 are one convolution"):
        Reprogramming().fit(nn.Sequential(shared, shared))
    with pytest.raises(UserError, match="a weight that is computed"):
        Reprogramming().fit(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 3))))
    with pytest.raises(UserError, match="are of one pixel"):
        Reprogramming().fit(nn.Sequential(nn.Conv2d(1, 1, 1)))


# The command.


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, images, and the model with banks of two of their tasks."""
    root = tmp_path_factory.mktemp("banks")
    model, bars = write_cnn(root / "cnn"), write_bars(root / "bars.npz")
    flags = ("--tasks", bars, "--variants", "plain", "invert", "--epochs", "2", "--batch-size", "8", "--lr", "0.02")
    done = overhaul("learn", "clr", model, "-o", root / "out", *flags, "--dtype", "fp32")
    assert done.code == 0, done.err
    return model, bars, root / "out"


def test_the_model_beside_the_banks_is_the_one_that_was_given(learnt: tuple[Path, Path, Path]):
    model, _, out = learnt
    one, other = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")

    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    assert AutoModelForImageClassification.from_pretrained(out).config.id2label == {0: "0", 1: "1"}
    assert banks.tasks_of(out) == ["plain", "invert"]
    shown = overhaul("show", out)
    assert "banks of 2 tasks: plain; invert" in shown.out
    assert "banked.use(banked.find('invert'))" in (out / "README.md").read_text()


def test_a_further_task_adds_a_file_and_changes_none(learnt: tuple[Path, Path, Path], tmp_path: Path):
    _, bars, out = learnt
    flags = ("--tasks", bars, "--variants", "rotate=90", "--epochs", "1", "--batch-size", "8", "--dtype", "fp32")
    done = overhaul("learn", "clr", out, "-o", tmp_path / "more", *flags)
    assert done.code == 0, done.err

    assert banks.tasks_of(tmp_path / "more") == ["plain", "invert", "rotate=90"]
    for one, other in zip(banks.files(out), banks.files(tmp_path / "more"), strict=False):
        assert one.read_bytes() == other.read_bytes()


def test_a_task_has_the_same_bank_wherever_in_the_order_it_stands(learnt: tuple[Path, Path, Path], tmp_path: Path):
    model, bars, _ = learnt
    flags = ("--tasks", bars, "--epochs", "1", "--batch-size", "8", "--dtype", "fp32", "--evaluate", "none")
    found = {}
    for name, variants in (("one", ("invert", "plain")), ("other", ("plain", "rotate=90", "invert"))):
        done = overhaul("learn", "clr", model, "-o", tmp_path / name, *flags, "--variants", *variants)
        assert done.code == 0, done.err
        found[name] = {task: load_file(banks.files(tmp_path / name)[place]) for place, task in enumerate(variants)}
    done = overhaul("learn", "clr", tmp_path / "one", "-o", tmp_path / "more", *flags, "--variants", "rotate=90")
    assert done.code == 0, done.err
    found["one"]["rotate=90"] = load_file(banks.files(tmp_path / "more")[2])

    for task, tensors in found["one"].items():
        assert all(torch.equal(tensor, found["other"][task][name]) for name, tensor in tensors.items()), task
    assert not torch.equal(*(found["one"][task]["classifier.1.weight"] for task in ("plain", "invert")))
    done = overhaul("learn", "clr", model, "-o", tmp_path / "seed", *flags, "--variants", "invert", "--seed", "1")
    assert done.code == 0, done.err
    other = load_file(banks.files(tmp_path / "seed")[0])
    assert not torch.equal(other["classifier.1.weight"], found["one"]["invert"]["classifier.1.weight"])


def test_banks_on_disk_say_what_they_said_in_training(learnt: tuple[Path, Path, Path]):
    model, _, out = learnt
    banked = Banked(artifact.load(out, kinds=(Kind.IMAGE_CLASSIFIER,)).model, Reprogramming())
    banked.read(out)
    assert [bank.classes for bank in banked.banks] == [("0", "1", "2", "3")] * 2
    banked.use(0)
    one = banked.model(**pixels()).logits
    again = Banked(artifact.load(model, kinds=(Kind.IMAGE_CLASSIFIER,)).model, Reprogramming())
    again.read(out)
    again.use(1)
    again.use(0)
    assert torch.equal(again.model(**pixels()).logits, one)


def test_what_a_bank_does_not_fit_is_refused(learnt: tuple[Path, Path, Path], tmp_path: Path):
    _, bars, out = learnt
    how = ("-o", tmp_path / "out", "--tasks", bars)
    refused(overhaul("learn", "clr", out, *how, "--variants", "invert"), "a bank of a task named invert already")
    refused(overhaul("learn", "clr", out, *how, "--kernel", "5"), "learnt with kernel 3, and this is 5")
    refused(overhaul("learn", "clr", out, *how, "--kernel", "4"), "kernel 4 has no middle; use 3 or 5")
    refused(
        overhaul("learn", "clr", out, *how, "--batch-size", "1"), "--batch-size 1 leaves batch normalisations nothing"
    )
    refused(overhaul("learn", "bregman", out, *how), "has banks of 2 tasks, such as plain, which fit no other weights")


def test_a_bank_of_another_model_and_a_damaged_one_are_refused(learnt: tuple[Path, Path, Path], tmp_path: Path):
    _, _, out = learnt
    other = Banked(cnn(tmp_path / "other"), Reprogramming())
    changed = Banked(artifact.load(write_cnn(tmp_path / "seed", seed=1), kinds=(Kind.IMAGE_CLASSIFIER,)).model,
                     Reprogramming())  # fmt: skip
    with pytest.raises(UserError, match="bank of another model"):
        changed.read(out)
    folder = tmp_path / "damaged" / "banks"
    folder.mkdir(parents=True)
    save_file({"x": torch.ones(1)}, folder / "000.safetensors")
    with pytest.raises(UserError, match="damaged or no bank"):
        other.read(tmp_path / "damaged")
    (folder / "000.safetensors").write_bytes(banks.files(out)[0].read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged or no bank"):
        other.read(tmp_path / "damaged")
