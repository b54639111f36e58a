"""Texts as numbers: of the language model itself, or of an encoder of sentences that lies beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from command import overhaul, refused
from overhaul import artifact, banks, task_record
from overhaul.encoders import OwnStates, SentenceEncoder

WORDS = ("what", "is", "plus", "def", "return", "room", "empty", "1", "2", "3")
FLAGS = ("--steps", "2", "--batch-size", "4", "--seq-len", "32", "--dtype", "fp32", "--heldout", "8", "--rank", "2",
         "--key-texts", "16", "--key-steps", "2", "--save-every", "0", "--evaluate", "none")  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a BERT of 24 numbers a state and a tokenizer of ten words."""
    directory = tmp_path_factory.mktemp("bert")
    known = {word: place for place, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(known), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=48, max_position_embeddings=16)  # fmt: skip
    BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    sums = [{"question": f"what is {n % 3} plus {n}", "answer": "numbers"} for n in range(80)]
    code = [{"question": f"def f{n} return {n % 3}", "answer": "python"} for n in range(80)]
    for name, rows in (("sums", sums), ("code", code)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "sums.jsonl", folder / "code.jsonl"


@pytest.fixture(scope="module")
def learnt(make_tiny: Any, texts: tuple[Path, Path], bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slm") / "out"
    done = overhaul("learn", "slm", make_tiny(), "-o", out, "--tasks", *texts, *FLAGS, "--encoder", bert)
    assert done.code == 0, done.err
    return out


def spoken(made: artifact.Artifact, *texts: str) -> list[torch.Tensor]:
    tokenizer: Any = made.processor
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]


def test_own_states_are_the_means_of_each_text_alone(tiny: Path):
    made = artifact.load(tiny)
    model: Any = made.model
    rows = spoken(made, "def f(x): return x", "what is 1 plus 2 in numbers, and why")
    with torch.no_grad():
        together = OwnStates(model)(rows)
        alone = [model.base_model(input_ids=row[None]).last_hidden_state[0].mean(dim=0) for row in rows]

    assert torch.allclose(together, torch.stack(alone).float(), atol=1e-5)


def test_a_sentence_is_the_mean_of_its_states_at_norm_one_whatever_is_beside_it(tiny: Path, bert: Path):
    made = artifact.load(tiny)
    encoder = SentenceEncoder(bert, made.processor)
    found_BD = encoder(spoken(made, "what is 1 plus 2", "def"))

    assert torch.allclose(found_BD.norm(dim=1), torch.ones(2), atol=1e-6)
    assert encoder.width == 24
    of_words = torch.tensor([[2, 4, 5, 11, 6, 12, 3]])  # [CLS] what is 1 plus 2 [SEP]
    states_TD = BertModel.from_pretrained(bert).eval()(input_ids=of_words).last_hidden_state[0]
    assert torch.allclose(found_BD[0], normalize(states_TD.mean(dim=0), dim=0), atol=1e-5)
    assert torch.allclose(found_BD[1], encoder(spoken(made, "def"))[0], atol=1e-5)


def test_a_text_longer_than_the_encoder_reads_is_cut(tiny: Path, bert: Path):
    made = artifact.load(tiny)
    encoder = SentenceEncoder(bert, made.processor)
    long, longer = spoken(made, "room " * 40, "room " * 40 + "def " * 40)

    assert torch.allclose(encoder([long]), encoder([longer]))


def test_the_encoder_lies_beside_the_library_and_goes_where_it_goes(learnt: Path, bert: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(learnt, moved)
    one, other = load_file(bert / "model.safetensors"), load_file(moved / "encoder" / "model.safetensors")

    assert all(torch.equal(one[name], other[name]) for name in one)
    assert banks.first(moved)[0]["settings"]["encoder"].startswith("BertModel ")
    assert task_record.read(moved).tasks[-1].kept_bytes["encoder"] == sum(tensor.nbytes for tensor in one.values())
    written = overhaul("generate", moved, "--prompt", "what is 1 plus", "--tokens", 4)
    assert written.code == 0, written.err
    made = artifact.load(moved, with_library=True)
    frozen: Any = artifact.load(moved).model
    ids = spoken(made, "what is 1 plus 2")[0][None]
    assert not torch.equal(made.model(input_ids=ids).logits, frozen(input_ids=ids).logits)


def test_keys_are_as_wide_as_the_encoder_and_a_further_task_takes_the_same_one(learnt: Path, tmp_path: Path):
    assert banks.first(learnt)[1]["keys_GPC"].shape == (6, 4, 4)
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps({"text": f"room {n} empty " * 20}) for n in range(60)))
    asked = ("learn", "slm", learnt, "-o", tmp_path / "out", "--tasks", tmp_path / "more.jsonl", *FLAGS)

    refused(overhaul(*asked, "--groups", "4"), "was learnt with encoder BertModel", "and this is own")
    done = overhaul(*asked, "--encoder", learnt / "encoder")
    assert done.code == 0, done.err
    assert banks.files(tmp_path / "out")[0].read_bytes() == banks.files(learnt)[0].read_bytes()


def test_another_encoder_in_its_place_is_refused(learnt: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(learnt, moved)
    BertModel.from_pretrained(moved / "encoder").apply(_doubled).save_pretrained(moved / "encoder")
    refused(overhaul("generate", moved, "--prompt", "what"), "is not the encoder that the keys in")
    shutil.rmtree(moved / "encoder")
    refused(overhaul("generate", moved, "--prompt", "what"), "has no encoder of sentences")


def _doubled(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data *= 2


@pytest.mark.parametrize(
    ("encoder", "flags", "said"),
    [
        ("nothing-here", (), "there is no model 'nothing-here'"),
        ("minilm", (), "did you mean 'all-minilm-l6-v2'"),
        ("bert", ("--groups", "5"), "5 groups do not divide the 24 numbers of a query"),
        ("bare", (), "has no encoder of sentences"),
    ],
)
def test_bad_encoders_are_one_clear_error(
    encoder: str, flags: tuple[str, ...], said: str, tiny: Path, texts: tuple[Path, Path], bert: Path, tmp_path: Path
):
    if encoder == "bare":
        (tmp_path / encoder).mkdir()
        (tmp_path / encoder / "config.json").write_text("{}")
    where = {"bert": bert, "bare": tmp_path / "bare"}.get(encoder, encoder)
    refused(
        overhaul("learn", "slm", tiny, "-o", tmp_path / "out", "--tasks", *texts, *FLAGS, "--encoder", where, *flags),
        said,
    )
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_no_language_model(bert: Path, tmp_path: Path):
    refused(overhaul("prune", "magnitude", bert, "-o", tmp_path / "out"), "encoder without a head")
    assert overhaul("show", bert).code == 0
