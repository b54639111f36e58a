"""`extend mix-cpt`: what it is without a divergence, what is read as plain text, and what is refused."""

from __future__ import annotations

import copy
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer

from command import overhaul
from overhaul import artifact
from overhaul.corpora import as_plain_text, open_corpus
from overhaul.data import Data
from overhaul.distillation import Distill
from overhaul.documents import Message, Row
from overhaul.documents import as_plain_text as plain_row
from overhaul.extend.mix_cpt import MixCPT
from overhaul.objective import Forward
from overhaul.stream import IGNORED, Batch

TINY = ("--steps", "5", "--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--lr", "1e-3", "--data", "sample",
        "--evaluate", "none")  # fmt: skip


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("general") / "instructions.jsonl"
    rows = (
        {"prompt": f"What is {number} and {number}? ", "completion": f"It is {2 * number}."} for number in range(300)
    )
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_without_a_divergence_it_is_continual_pre_training(tiny: Path, tmp_path: Path):
    assert overhaul("extend", "mix-cpt", tiny, "-o", tmp_path / "mix", *TINY, "--kl-weight", "0").code == 0
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "cpt", *TINY).code == 0

    own, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("mix", "cpt"))
    assert all(torch.equal(own[name], plain[name]) for name in plain)


@pytest.mark.parametrize("swap", [True, False])
def test_the_divergence_is_torchs_over_trained_tokens(tiny: Path, swap: bool):
    """Of the next word, with ignored labels left out: an off-by-one would show."""
    model = artifact.load(tiny, dtype=torch.float32).model
    teacher: Any = copy.deepcopy(model)
    student: Any = model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    ids_BT = torch.randint(500, (2, 16), generator=torch.Generator().manual_seed(1))
    labels_BT = ids_BT.clone()
    labels_BT[0, :5] = labels_BT[1, 9:12] = IGNORED
    batch = {"input_ids": ids_BT, "labels": labels_BT}
    term = Distill(teacher, swap=swap)

    loss = term.total(Forward(model, batch), batch).detach()

    before_BTV, after_BTV = (one(input_ids=ids_BT).logits[:, :-1].detach() for one in (teacher, student))
    wanted = torch.zeros(())
    golds = labels_BT[:, 1:].flatten().tolist()
    for before_V, after_V, gold in zip(before_BTV.flatten(0, 1), after_BTV.flatten(0, 1), golds, strict=True):
        if gold == IGNORED:
            continue
        target_V, top = before_V.clone(), int(before_V.argmax())
        if swap:
            target_V[gold], target_V[top] = before_V[top], before_V[gold]
        wanted = wanted + F.kl_div(after_V.log_softmax(-1), target_V.softmax(-1), reduction="sum")
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)
    assert term.count(batch) == 2 * 15 - 4 - 3


def test_a_model_is_no_teacher_of_itself(tiny: Path):
    model = artifact.load(tiny, dtype=torch.float32).model
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": torch.zeros(1, 4, dtype=torch.int64)}

    with pytest.raises(ValueError, match="use a frozen copy"):
        Distill(model).total(Forward(model, batch), batch)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ((("text", "as it is"),), "as it is"),
        ((("prompt", "1 + 1 ="), ("completion", " 2")), "1 + 1 = 2"),
        ((("question", "Why?"), ("answer", "So.")), "Why?\nSo."),
        ((("prompt", "Say: "), ("chosen", "yes"), ("rejected", "no")), "Say: yes"),
        ((("messages", (Message("user", "Hello"), Message("assistant", "Hi"))),), "Hello\nHi"),
    ],
)
def test_rows_as_plain_text(columns: Any, text: str):
    assert dict(plain_row(Row(columns))) == {"text": text}


def test_instructions_are_trained_on_as_a_whole_in_their_share(tiny: Path, general: Path):
    data = Data(open_corpus("sample"), AutoTokenizer.from_pretrained(tiny))
    how: dict[str, Any] = {"seq_len": 32, "batch_size": 4}
    settings = MixCPT(general=str(general), general_share=0.5, **how)
    stream = Batch(settings.mixed(settings.sources(data), data), batch_size=4)

    batches = list(islice(stream, 20))

    assert {drawn.name: drawn.tokens for drawn in stream.ledger()} == {"sample": 40 * 32, "instructions.jsonl": 40 * 32}
    assert not any((batch["labels"] == IGNORED).any() for batch in batches)
    assert any("What is" in text for batch in batches for text in data.tokenizer.batch_decode(batch["input_ids"]))


def test_with_a_document_mask_instructions_are_kept_apart_too(tiny: Path, general: Path):
    data = Data(open_corpus("sample"), AutoTokenizer.from_pretrained(tiny))
    settings = MixCPT(general=str(general), general_share=0.5, seq_len=64, batch_size=2, document_mask=True)

    sources = settings.sources(data)

    assert all("position_ids" in next(source.windows) for source in sources.values())
    assert (next(sources["instructions.jsonl"].windows)["position_ids"] == 0).sum() > 1


def test_plain_text_is_another_corpus(general: Path):
    corpus = open_corpus(general)

    assert as_plain_text(corpus).fingerprint != corpus.fingerprint
    assert as_plain_text(as_plain_text(corpus)).fingerprint == as_plain_text(corpus).fingerprint


def test_a_run_with_all_of_it(tiny: Path, general: Path, tmp_path: Path):
    done = overhaul(
        "extend", "mix-cpt", tiny, "-o", tmp_path / "out", *TINY, "--general", general, "--replay", "stdlib"
    )

    assert done.code == 0, done.err
    points = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert set(points[-1]) >= {"loss/cross_entropy", "loss/swapped_kl", "seen/sample", "seen/instructions.jsonl"}
    total, ce, kl = (points[2][key] for key in ("loss", "loss/cross_entropy", "loss/swapped_kl"))
    assert total == pytest.approx(ce + 0.3 * kl)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ce_weight": 0.0, "kl_weight": 0.0}, "there is no loss"),
        ({"ce_weight": 0.0, "swap": False}, "learns nothing"),
        ({"general_share": 0.5}, "needs a corpus of instructions"),
        ({"general": "a", "replay": "a"}, "a text is one or the other"),
        ({"kl_weight": -1.0}, "greater than or equal to 0"),
        ({"general": "a", "general_share": 0.7, "replay": "b", "replay_share": 0.3}, "leave nothing of the tokens"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        MixCPT(**settings)
