"""A corpus as one model sees it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from overhaul.adapt.full import Full
from overhaul.corpora import open_corpus
from overhaul.data import Data
from overhaul.documents import Message, Row, text_row
from overhaul.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def data(tokenizer: Any, tmp_path: Path) -> Data:
    lines = [json.dumps({"text": f"Document number {n} is about {n * n}. " * 6}) for n in range(200)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return Data(open_corpus(tmp_path / "corpus.jsonl"), tokenizer)


def trained_text(data: Data, row: Row) -> tuple[str, str]:
    """The whole text of an encoded row, and what of it is trained on."""
    encoded = data.encode(row)
    return data.tokenizer.decode(encoded.ids), data.tokenizer.decode(encoded.ids[encoded.trained])


def test_a_document_is_closed_by_the_end_token(data: Data):
    assert trained_text(data, text_row("Call me Ishmael.")) == ("Call me Ishmael.<|im_end|>",) * 2


def test_a_document_is_opened_as_the_tokenizer_opens_texts(data: Data, tiny: Path):
    opens = AutoTokenizer.from_pretrained(tiny)
    bos = (opens.bos_token, opens.bos_token_id)
    opens.backend_tokenizer.post_processor = TemplateProcessing(single=f"{opens.bos_token} $A", special_tokens=[bos])

    whole, trained = trained_text(replace(data, tokenizer=opens), text_row("Call me Ishmael."))

    assert whole == "<|im_start|>Call me Ishmael.<|im_end|>"
    assert trained == "Call me Ishmael.<|im_end|>"


def test_only_the_answer_is_trained_on(data: Data):
    row = Row((("prompt", "2 + 2 ="), ("completion", " 4")))

    assert trained_text(data, row) == ("2 + 2 = 4<|im_end|>", " 4<|im_end|>")


def test_of_a_conversation_the_assistants_words_and_end_are_trained_on(data: Data):
    turns = (Message("user", "Hello"), Message("assistant", "Good day."), Message("user", "Bye"))

    whole, trained = trained_text(data, Row((("messages", turns),)))

    expected = data.tokenizer.apply_chat_template([turn._asdict() for turn in turns], tokenize=False)
    assert whole == expected + "<|im_end|>"
    assert trained == "Good day.<|im_end|>\n<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_an_error_with_its_message(data: Data, tiny: Path):
    strict = AutoTokenizer.from_pretrained(tiny)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1]['content'] == 'Wait' %}{{ raise_exception('No') }}{% endif %}"
    )
    strict_data = replace(data, tokenizer=strict, model="gemma")
    ordered = (Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Good day."))

    with pytest.raises(UserError, match="template of gemma refuses turns of system: System role not supported"):
        strict_data.segments(Row((("messages", ordered),)))
    with pytest.raises(UserError, match="refuses turns of user: No"):
        strict_data.segments(Row((("messages", (Message("user", "Wait"), ordered[-1])),)))


def test_windows_do_not_overlap_and_hold_all_of_the_text(data: Data):
    windows_NT = data.windows("heldout", seq_len=16)

    text = "".join(data.tokenizer.decode(data.encode(row).ids) for row in data.corpus.heldout)
    assert text.startswith(data.tokenizer.decode(windows_NT.flatten()))
    assert (data.windows("heldout", seq_len=16, limit=2) == windows_NT[:2]).all()


def test_training_batches_have_the_shape_asked_for_and_follow_the_seed(data: Data):
    settings = Full(batch_size=3, seq_len=16)

    def first(seed: int) -> Any:
        return next(Data(data.corpus, data.tokenizer, seed).training(settings))["input_ids"]

    assert first(0).shape == (3, 16)
    assert (first(0) == first(0)).all()
    assert (first(0) != first(1)).any()


def test_a_document_mask_is_another_place_in_the_same_text(data: Data):
    plain, masked = (next(data.endless(seq_len=32, document_mask=masked)) for masked in (False, True))

    assert plain["input_ids"].tolist() == masked["input_ids"].tolist()
    assert set(masked) - set(plain) == {"position_ids"}
    assert data.place(seq_len=32, document_mask=False) == data.place(seq_len=32)
    assert data.place(seq_len=32, document_mask=True) != data.place(seq_len=32)


def test_calibration_uses_what_there_is_and_says_so(data: Data, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        batches = list(data.calibration(samples=100_000, seq_len=64))

    assert "100000 were asked for" in caplog.text
    assert len(batches) == int(caplog.text.split(" holds ")[1].split()[0])
    assert sum(len(batch["input_ids"]) for batch in data.calibration(samples=6, seq_len=64, batch_size=4)) == 6


READERS: dict[str, Callable[[Data], object]] = {
    "windows": lambda data: data.windows("heldout", seq_len=100_000),
    "training": lambda data: data.training(Full(seq_len=100_000)),
    "calibration": lambda data: data.calibration(samples=1, seq_len=100_000),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_text_shorter_than_a_window_says_how_long_it_is(data: Data, read: Callable[[Data], object]):
    with pytest.raises(UserError, match=r"'corpus.jsonl'.* tokens.*\n.*--seq-len up to \d+"):
        read(data)


def test_epochs_become_steps(data: Data):
    settings = Full(epochs=2, batch_size=2, accumulate=2, seq_len=32)

    steps = data.steps_for(settings).steps

    assert steps == -(-2 * data.num_training_tokens // (2 * 2 * 32))
    assert data.steps_for(settings, processes=2).steps in (steps // 2, steps // 2 + 1)
    assert data.steps_for(Full(steps=5)).steps == 5


def test_another_corpus_is_opened_and_encoded_once(data: Data):
    assert data.on("sample") is data.on("sample")
    assert data.on("sample").corpus.name == "sample"
    assert data.on("sample").num_training_tokens != data.num_training_tokens
