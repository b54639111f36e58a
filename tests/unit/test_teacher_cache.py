"""A teacher's likeliest words on disk: what is found is what would be computed, and nothing else is ever used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from overhaul import artifact, teacher_cache
from overhaul.adapt.full import Full
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.distillation import Distill, distillation_plan
from overhaul.errors import UserError
from overhaul.objective import Forward
from overhaul.teacher_cache import TeacherCache
from overhaul.train import train

WORDS = 512
Open = Callable[..., TeacherCache]


@pytest.fixture(scope="module")
def teacher(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny).requires_grad_(False)


@pytest.fixture(scope="module")
def student(make_tiny: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_tiny(tie=False, bias=True))


@pytest.fixture
def loads() -> list[object]:
    """One entry for each time a teacher was loaded."""
    return []


@pytest.fixture
def opened(tmp_path: Path, teacher: Any, loads: list[object]) -> Open:
    def make(model: Any = teacher, **changed: Any) -> TeacherCache:
        def load() -> Any:
            loads.append(1)
            return model

        how = {"teacher_sha256": "0" * 64, "dtype": torch.float32, "top_k": 8, "num_words": WORDS, "temperature": 1.0}
        return TeacherCache(load, directory=tmp_path / "cache", **{**how, **changed})

    return make


def test_words_are_the_teachers(opened: Open, teacher: Any, batch: dict[str, Tensor]):
    more = opened().with_words(batch)

    log_probs_BTV = teacher(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    expected = log_probs_BTV.topk(8)
    assert list(more)[:2] == ["input_ids", "labels"], "the loop counts tokens by the first tensor"
    assert torch.equal(more["teacher_ids"], expected.indices)
    torch.testing.assert_close(more["teacher_log_probs"], expected.values)
    tail_BT = log_probs_BTV.scatter(-1, expected.indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(more["teacher_log_tail"], tail_BT)


def test_they_are_computed_once(opened: Open, loads: list[object], batch: dict[str, Tensor]):
    first, again = opened().with_words(batch), opened().with_words(batch)

    assert len(loads) == 1
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "changed",
    [
        {"teacher_sha256": "1" * 64},
        {"top_k": 7},
        {"num_words": WORDS - 1},
        {"temperature": 2.0},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_question_gets_no_old_answer(
    opened: Open, loads: list[object], batch: dict[str, Tensor], changed: dict[str, Any]
):
    opened().with_words(batch)

    opened(**changed).with_words(batch)

    assert len(loads) == 2


def test_other_tokens_get_no_old_answer(opened: Open, loads: list[object], batch: dict[str, Tensor]):
    cache = opened()
    cache.with_words(batch)
    for other in (batch["input_ids"].flip(0), batch["input_ids"].view(4, 8), batch["input_ids"].int()):
        opened().with_words({**batch, "input_ids": other})

    assert len(loads) == 4


def test_another_version_gets_no_old_answer(
    opened: Open, loads: list[object], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
):
    opened().with_words(batch)
    monkeypatch.setattr(teacher_cache, "_FORMAT", 99)

    opened().with_words(batch)

    assert len(loads) == 2


@pytest.mark.parametrize("harm", ["cut short", "another's name", "empty"])
def test_a_file_that_is_not_what_it_says_is_made_anew(
    opened: Open, loads: list[object], batch: dict[str, Tensor], harm: str
):
    first = opened().with_words(batch)
    (path,) = opened().directory.glob("*.safetensors")
    if harm == "another's name":
        opened().with_words({**batch, "input_ids": batch["input_ids"].flip(0)})
        (other,) = set(opened().directory.glob("*.safetensors")) - {path}
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(path.read_bytes()[: 100 if harm == "cut short" else 0])
    before = len(loads)

    again = opened().with_words(batch)

    assert len(loads) == before + 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert load_file(path)["teacher_ids"].dtype == torch.uint16


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_all_words_are_the_whole_divergence(
    opened: Open, teacher: Any, student: Any, batch: dict[str, Tensor], direction: Any
):
    cache = opened(top_k=WORDS, temperature=2.0)
    how: dict[str, Any] = {"temperature": 2.0, "direction": direction}

    live = Distill(teacher, **how).total(Forward(student, batch), batch)
    cached = Distill(cache, **how).total(Forward(student, batch), cache.with_words(batch))

    torch.testing.assert_close(cached, live)


def test_training_from_the_cache_needs_no_teacher_the_second_time(
    opened: Open, loads: list[object], student: Any, tiny: Path
):
    data = Data(open_corpus(CorpusSpec(path="sample")), artifact.load(tiny).processor)
    settings, made = Full(steps=3, batch_size=2, seq_len=32, lr=1e-3, save_every=0), []
    for _ in range(2):
        own = copy.deepcopy(student)
        history = train(distillation_plan(own, opened(), data, settings), settings, quiet=True)
        made.append((own, [point["loss"] for point in history.points]))

    assert len(loads) == 1
    assert made[0][1] == made[1][1]
    assert made[0][1][-1] < made[0][1][0]
    assert all(torch.equal(*pair) for pair in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True))


def test_files_have_the_size_that_was_told(opened: Open, batch: dict[str, Tensor]):
    cache = opened()
    cache.with_words(batch)

    (path,) = cache.directory.glob("*.safetensors")
    assert 0 < path.stat().st_size - cache.num_bytes(2 * 15) < 1500, "what is more is the header"


def test_a_disk_without_room_is_told_before_the_work(opened: Open):
    with pytest.raises(UserError, match="--top-k"):
        opened().refuse_full_disk(10**15)
