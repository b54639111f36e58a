"""Classifiers of architectures of our own: read by our code, written with it, learnt; plain transformers reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command import interrupted, overhaul, python, refused
from images import SIZE, write_bars, write_cnn, write_own
from overhaul import artifact, models
from overhaul.errors import UserError
from overhaul.kinds import Kind

FLAGS = ("--split", 2, "--epochs", 1, "--batch-size", 8, "--lr", 0.02)
MEMORY = ("--memory", 24)


@pytest.fixture(params=["cct", "efficientnet_lite"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_own(tmp_path / request.param, request.param)


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    return write_bars(tmp_path / "bars.npz", each=20)


def source_of(architecture: str) -> bytes:
    return (Path(models.__file__).parent / f"{architecture}.py").read_bytes()


def plant(directory: Path, name: str) -> Path:
    """A copy of a directory with code in the model's file that would leave a trace where it ran."""
    copy = Path(shutil.copytree(directory, directory.parent / f"{directory.name}-planted"))
    (copy / name).write_text(f"open({str(copy / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    return copy


def test_a_directory_is_read_by_our_code_and_written_with_it(own: Path, bars: Path):
    planted = plant(own, f"{own.name}.py")
    out = own.parent / "out"

    done = overhaul("learn", "bregman", planted, "-o", out, "--tasks", bars, *FLAGS, *MEMORY)

    assert done.code == 0, done.err
    assert not (planted / "ran").exists()
    assert (out / f"{own.name}.py").read_bytes() == source_of(own.name)
    assert set(json.loads((out / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModelForImageClassification",
    }
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    assert artifact.verify(out)
    shown = overhaul("show", out)
    assert shown.code == 0, shown.err
    assert "learn bregman" in shown.out
    assert artifact.read_config(out).num_labels == 4


PLAIN = """
import sys
sys.modules["overhaul"] = None
sys.path[:] = [folder for folder in sys.path if not folder.endswith("src")]
import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
directory, picture, out = sys.argv[1:]
model, told = AutoModelForImageClassification.from_pretrained(
    directory, trust_remote_code=True, output_loading_info=True
)
assert not any(told.values()), told
processor = AutoImageProcessor.from_pretrained(directory)
given = processor([np.load(picture)], input_data_format="channels_last", return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(given["pixel_values"]).logits
np.save(out, logits.numpy())
for part in (model, processor):
    part.save_pretrained(directory + "-again")
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
"""


def test_plain_transformers_reads_it_where_overhaul_is_not_installed(own: Path, tmp_path: Path):
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", picture)

    names = (own, tmp_path / "picture.npy", tmp_path / "logits.npy")
    done = python(PLAIN, *names, env={"HF_MODULES_CACHE": str(tmp_path / "hf")})

    assert done.code == 0, done.err
    made = artifact.load(own, kinds=(Kind.IMAGE_CLASSIFIER,))
    given = made.processor([picture], input_data_format="channels_last", return_tensors="pt")
    with torch.no_grad():
        wanted = made.model(**given).logits
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted.numpy(), rtol=0, atol=1e-6)
    again = artifact.load(f"{own}-again", kinds=(Kind.IMAGE_CLASSIFIER,)).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in made.model.state_dict().items())


def test_what_no_code_here_reads_is_one_clear_error(tmp_path: Path, bars: Path, monkeypatch: pytest.MonkeyPatch):
    def asks(*_: Any) -> str:
        raise AssertionError("nobody is asked whether code may run")

    monkeypatch.setattr("builtins.input", asks)
    foreign = plant(write_own(tmp_path / "foreign", "cct"), "cct.py")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"model_type": "hyena"}))

    words = ("needs code of its own, for the architecture 'hyena'", "cct, efficientnet_lite")
    refused(overhaul("show", foreign), *words)
    refused(overhaul("learn", "bregman", foreign, "-o", tmp_path / "out", "--tasks", bars), *words)
    with pytest.raises(UserError, match="what lies in directories is not run"):
        artifact.read_config(foreign)
    assert not (foreign / "ran").exists()


def test_code_beside_an_architecture_of_transformers_is_not_run(tmp_path: Path):
    planted = plant(write_cnn(tmp_path / "cnn"), "resnet.py")
    config = json.loads((planted / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "resnet.C", "AutoModelForImageClassification": "resnet.M"}
    (planted / "config.json").write_text(json.dumps(config))

    made = artifact.load(planted, kinds=(Kind.IMAGE_CLASSIFIER,))

    assert type(made.model).__module__.startswith("transformers.")
    assert not models.is_own(made.model)
    assert not (planted / "ran").exists()


def test_a_shape_that_cannot_be_is_one_clear_error(tmp_path: Path):
    directory = write_own(tmp_path / "cct", "cct")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))

    refused(overhaul("show", directory), "hidden_size 16 is not divisible by 3 heads")


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(own: Path, bars: Path):
    """With dropout of attention and of whole branches, which draw random numbers."""
    how = ("learn", "bregman", own, "--tasks", bars, *FLAGS, *MEMORY, "--save-every", 2)
    whole, cut = own.parent / "whole", own.parent / "cut"
    assert overhaul(*how, "-o", whole).code == 0
    assert interrupted(lambda seen: len(seen) == 7, *how, "-o", cut).code != 0
    assert overhaul(*how, "-o", cut, "--resume").code == 0

    one, other = (load_file(directory / "model.safetensors") for directory in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_its_weights_have_a_fisher_information(own: Path, bars: Path):
    """Gradients of single examples go through every layer."""
    out = own.parent / "out"
    done = overhaul(
        "learn", "bregman", own, "-o", out, "--tasks", bars, *FLAGS, "--output-term", "none", "--weight-term", "ewc"
    )
    assert done.code == 0, done.err


def test_what_counts_as_a_weight_beside_the_files_is_alpha_alone(tmp_path: Path):
    def told(**config: Any) -> bytes:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return models.beside_weights(tmp_path)

    assert models.beside_weights(tmp_path) == b""
    assert told(model_type="whp", alpha=1) == told(model_type="whp", alpha=1.0) != told(model_type="whp", alpha=1.5)
    assert told(model_type="llama", alpha=1) == told(model_type="whp") == told(alpha=1) == b""
    (tmp_path / "config.json").write_text("[")
    assert models.beside_weights(tmp_path) == b""


def test_registering_again_changes_nothing():
    from transformers import CONFIG_MAPPING

    before = [CONFIG_MAPPING[models.register(name) or name] for name in models.MODEL_TYPES]
    models.register("no-such-architecture")

    assert before == [models.classes(name)[0] for name in models.MODEL_TYPES]
    assert "no-such-architecture" not in CONFIG_MAPPING
    assert {f"{name}.py" for name in models.MODEL_TYPES} == set(models.FILES)
    assert all((Path(models.__file__).parent / name).is_file() for name in models.FILES)
