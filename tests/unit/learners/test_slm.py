"""A library of increments: what is added, what is found, what stays, and that it is one file a task."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from command import overhaul, refused
from overhaul import artifact, banks, task_record
from overhaul.encoders import OwnStates
from overhaul.layers.joint import Choice, JointlyAdapted
from overhaul.library import Library, attached, outputs_of
from overhaul.retrieval import Found, find, first_keys, pull, similarities

FLAGS = ("--steps", "30", "--batch-size", "4", "--seq-len", "32", "--dtype", "fp32", "--heldout", "8", "--rank", "2",
         "--groups", "4", "--key-texts", "32", "--key-steps", "10")  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two kinds of question with one word as their answer."""
    folder = tmp_path_factory.mktemp("texts")
    sums = [
        {"question": f"What is {a} plus {b} in numbers?", "answer": "numbers"} for a in range(20) for b in range(15)
    ]
    words = [{"question": f"def f{n}(x): return x[{n}]", "answer": "python"} for n in range(300)]
    for name, rows in (("sums", sums), ("code", words)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "sums.jsonl", folder / "code.jsonl"


def library(model: Any, **settings: Any) -> Library:
    how = {"rank": 2, "entries": 3, "top_k": 2, "groups": 4, "query_tokens": 16, "unknown": 0.0}
    return Library(model, encoder=OwnStates(model), centre_D=torch.zeros(()), **{**how, **settings})


# Increments.


def test_what_is_added_is_the_weighted_sum_of_the_products():
    choice = Choice()
    layer = JointlyAdapted(torch.nn.Linear(6, 5), choice, entries=4, rank=2).double()
    torch.nn.init.normal_(layer.up_PRO)
    x_BTI = torch.randn(3, 7, 6, dtype=torch.float64)
    choice.take(torch.tensor([[0, 2], [3, 1], [2, 0]]), torch.tensor([[0.7, 0.3], [0.5, 0.5], [1.0, 0.0]]).double())
    found = layer(x_BTI)

    for row in range(3):
        merged = layer.linear.weight + layer.increment(row)
        assert torch.allclose(found[row], x_BTI[row] @ merged.T + layer.linear.bias, atol=1e-12)
    entries, weights = choice.entries_BK, choice.weights_BK
    assert entries is not None
    assert weights is not None
    by_hand = sum(w * layer.up_PRO[k].T @ layer.down_PRI[k] for k, w in zip(entries[0], weights[0], strict=True))
    assert torch.allclose(layer.increment(0), by_hand, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_one_entry_of_weight_one_is_a_lora_of_peft(tiny: Path):
    peft = pytest.importorskip("peft")
    model: Any = artifact.load(tiny).model
    other = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["o_proj"], lora_dropout=0.0)
    )
    kept = library(model, top_k=1)
    for name, layer in kept.layers.items():
        torch.nn.init.normal_(layer.up_PRO)
        theirs = other.get_submodule(f"base_model.model.{name}")
        theirs.lora_A["default"].weight.data = layer.down_PRI.data[1].clone()
        theirs.lora_B["default"].weight.data = layer.up_PRO.data[1].T.clone()
    kept.choice.take(torch.tensor([[1]]), torch.ones(1, 1))
    ids = torch.arange(20)[None]

    assert torch.allclose(model(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-4)


def test_a_new_entry_changes_nothing_and_the_model_comes_out_as_it_went_in(tiny: Path):
    model: Any = artifact.load(tiny).model
    ids, before = torch.arange(20)[None], banks.fingerprint(model)
    logits = model(input_ids=ids).logits
    kept = library(model)
    kept.begin()
    kept.choice.take(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))

    assert torch.equal(model(input_ids=ids).logits, logits)
    assert banks.fingerprint(kept.restore()) == before
    assert outputs_of(model) == [f"model.layers.{n}.self_attn.o_proj" for n in range(2)]


def test_rows_of_a_batch_are_answered_as_if_each_were_alone(tiny: Path):
    model: Any = artifact.load(tiny).model
    kept = library(model)
    for layer in kept.layers.values():
        torch.nn.init.normal_(layer.up_PRO)
    ids = torch.randint(5, 50, (3, 9))
    entries, weights = torch.tensor([[0, 1], [2, 0], [1, 2]]), torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    kept.choice.take(entries, weights)
    together = model(input_ids=ids).logits

    for row in range(3):
        kept.choice.take(entries[row : row + 1], weights[row : row + 1])
        assert torch.allclose(model(input_ids=ids[row : row + 1]).logits[0], together[row], atol=1e-5)


# Keys.


def test_what_is_found_is_the_likest_by_the_mean_over_groups():
    queries_BD, keys_GPC = torch.randn(5, 12), torch.randn(3, 6, 4)
    found = find(queries_BD, keys_GPC, 2)

    alike = torch.stack(
        [
            torch.stack(
                [(normalize(q.view(3, 4), dim=1) * normalize(keys_GPC[:, p], dim=1)).sum(1).mean() for p in range(6)]
            )
            for q in queries_BD
        ]
    )
    assert torch.equal(found.entries_BK, alike.topk(2, dim=1).indices)
    assert torch.allclose(found.nearest_B, alike.max(dim=1).values, atol=1e-6)
    assert torch.allclose(similarities(queries_BD, keys_GPC).mean(1), alike, atol=1e-6)
    kept = alike.topk(2, dim=1).values.clamp_min(0)
    known = kept[:, 0] > 0
    assert torch.allclose(found.weights_BK[known], (kept / kept.sum(1, keepdim=True))[known], atol=1e-5)
    assert torch.allclose(found.weights_BK[known].sum(1), torch.ones(int(known.sum())))


def test_only_what_may_be_found_is_found_and_what_is_unlike_finds_nothing():
    keys_GPC = torch.eye(4)[None]
    query = torch.tensor([[1.0, 0.9, 0.0, 0.0]])

    assert find(query, keys_GPC, 1).entries_BK.tolist() == [[0]]
    allowed = torch.tensor([False, True, True, True])
    assert find(query, keys_GPC, 1, allowed).entries_BK.tolist() == [[1]]
    assert find(query, keys_GPC, 1, unknown=0.9).weights_BK.tolist() == [[0.0]]
    assert find(-query, keys_GPC, 1).weights_BK.tolist() == [[0.0]]
    with pytest.raises(ValueError, match="2 entries are to be found"):
        find(query, keys_GPC, 2, torch.tensor([True, False, False, False]))


def test_keys_begin_as_the_means_of_stripes_and_are_pulled_to_texts():
    queries_ND = torch.randn(8, 6)
    keys_GPC = first_keys(queries_ND, 2, 4)
    assert torch.allclose(keys_GPC[1, 3], normalize(queries_ND[6:].mean(0)[3:], dim=0), atol=1e-6)

    moved = keys_GPC.clone().requires_grad_(True)
    loss = pull(queries_ND, moved, 1, 0.0)
    alike = similarities(queries_ND, moved)
    assert float(loss.detach()) == pytest.approx(float(-alike.max(-1).values.mean(1).sum().detach()), abs=1e-5)
    torch.manual_seed(0)
    masked = [pull(queries_ND, keys_GPC, 1, 0.25) for _ in range(8)]
    assert min(masked) >= loss.detach() - 1e-6, "a key that is left out can only be missed"
    assert max(masked) > loss.detach()


# The command.


@pytest.fixture(scope="module")
def learnt(make_tiny: Any, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    tiny, out = make_tiny(), tmp_path_factory.mktemp("slm") / "out"
    done = overhaul("learn", "slm", tiny, "-o", out, "--tasks", *texts, *FLAGS)
    assert done.code == 0, done.err
    return tiny, out


def test_old_entries_stay_and_the_model_is_the_one_that_was_given(learnt: tuple[Path, Path]):
    tiny, out = learnt
    one, other = load_file(tiny / "model.safetensors"), load_file(out / "model.safetensors")

    assert all(torch.equal(one[name], other[name]) for name in one)
    assert banks.tasks_of(out) == ["sums.jsonl", "code.jsonl"]
    record, size = task_record.read(out), banks_size(out)
    assert record.matrices["task-IL"].values[-1].tolist() == record.matrices["task-IL"].values.diagonal().tolist()
    assert [one.kept_bytes["library"] for one in record.tasks] == [size, 2 * size]


def banks_size(out: Path) -> int:
    """Bytes of a task's keys and increments."""
    tensors = load_file(banks.files(out)[0])
    return sum(tensor.nbytes for name, tensor in tensors.items() if name != "centre_D")


def test_texts_find_the_entries_of_their_task_and_are_known_better_by_them(learnt: tuple[Path, Path]):
    tables = json.loads((learnt[1] / "overhaul.json").read_text())["tables"]
    found, losses = (next(table for table in tables if start in table["title"]) for start in ("For which", "Held-out"))

    assert [row[1 + place] for place, row in enumerate(found["rows"])] == ["100.0%", "100.0%"]
    assert all(told == untold for _, told, untold in losses["rows"]), "what is found is the same as with the task told"
    made = artifact.load(learnt[0])
    asked = torch.tensor(made.processor("def f301(x): return x[301]\npython")["input_ids"])[None]
    with torch.no_grad():
        before = made.model(input_ids=asked, labels=asked).loss
        after = attached(artifact.load(learnt[1]).model, learnt[1])(input_ids=asked, labels=asked).loss
    assert after < before


def test_while_a_text_is_written_on_its_increments_stay(learnt: tuple[Path, Path]):
    _, out = learnt
    made = artifact.load(out)
    tokenizer: Any = made.processor
    model: Any = attached(artifact.load(out).model, out)
    for question in ("What is 3 plus 4 in numbers?\n", "def f301(x): return x[301]\n"):
        ids = torch.tensor(tokenizer(question)["input_ids"])[None]
        written = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        merged: Any = copy.deepcopy(made.model)
        for name, layer in model.named_modules():
            if isinstance(layer, JointlyAdapted):
                merged.get_submodule(name).weight.data += layer.increment()
        assert torch.equal(written, merged.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0))
        assert not torch.allclose(merged(input_ids=ids).logits, made.model(input_ids=ids).logits, atol=1e-3)


def test_a_batch_filled_up_on_the_left_is_answered_row_by_row(learnt: tuple[Path, Path]):
    _, out = learnt
    made = artifact.load(out)
    tokenizer: Any = made.processor
    model: Any = attached(made.model, out)
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("What is 3 plus 4 in numbers?", "def f(x):")]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    together = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits

    for row, alone in zip(together, rows, strict=True):
        assert torch.allclose(row[-1], model(input_ids=alone[None]).logits[0, -1], atol=1e-4)


def test_generate_says_for_which_task_a_text_was_taken(learnt: tuple[Path, Path]):
    _, out = learnt
    for prompt, task in (("What is 3 plus 4 in numbers?", "sums.jsonl"), ("def f301(x): return x[301]", "code.jsonl")):
        done = overhaul("generate", out, "--prompt", prompt, "--tokens", "2")
        assert f"taken for a text of {task}" in done.told
        told = json.loads(overhaul("generate", out, "--prompt", prompt, "--tokens", "2", "--json").out)
        assert told["task"] == task


def test_the_nearest_entry_says_the_task_and_a_text_unlike_everything_has_none(tiny: Path):
    kept = library(artifact.load(tiny).model)
    kept.tasks = ["a", "b"]  # of three entries each
    found = Found(torch.tensor([[4, 1], [2, 3], [5, 0]]), torch.tensor([[0.6, 0.4], [1, 0], [0, 0]]), torch.zeros(3))

    assert kept.tasks_of(found) == ["b", "a", banks.FROZEN]


def test_a_further_task_adds_a_file_and_changes_none(learnt: tuple[Path, Path], tmp_path: Path):
    _, out = learnt
    (tmp_path / "more.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Room {n} is empty. " * 20}) for n in range(100))
    )
    done = overhaul(
        "learn",
        "slm",
        out,
        "-o",
        tmp_path / "more",
        "--tasks",
        tmp_path / "more.jsonl",
        *FLAGS,
        "--top-k",
        "1",
        "--unknown",
        "0.1",
    )
    assert done.code == 0, done.err

    assert banks.tasks_of(tmp_path / "more") == ["sums.jsonl", "code.jsonl", "more.jsonl"]
    for one, other in zip(banks.files(out), banks.files(tmp_path / "more"), strict=False):
        assert one.read_bytes() == other.read_bytes()
    told = [banks.last(where)[0] for where in (out, tmp_path / "more")]
    assert [(one["top_k"], one["unknown"]) for one in told] == [(2, 0.0), (1, 0.1)]


def test_bad_input_is_one_clear_error(learnt: tuple[Path, Path], texts: tuple[Path, Path], tmp_path: Path):
    tiny, out = learnt
    few = ("--seq-len", "32")

    def tried(model: Path, *flags: object) -> Any:
        return overhaul("learn", "slm", model, "-o", tmp_path / "out", "--tasks", *texts, *few, *flags)

    refused(tried(tiny, "--top-k", "9"), "top_k 9 is more than the 4 entries")
    refused(tried(tiny, "--groups", "7"), "7 groups do not divide the 64 numbers")
    refused(tried(tiny, "--rank", "0"), "rank")
    refused(tried(out, *FLAGS), "there is a bank of a task named sums.jsonl already")
    refused(tried(out, *FLAGS, "--rank", "3"), "learnt with rank 2, and this is 3")
    refused(overhaul("adapt", "lora", out, "-o", tmp_path / "out", "--data", "sample"), "has banks of 2 tasks")
    assert not (tmp_path / "out").exists()
