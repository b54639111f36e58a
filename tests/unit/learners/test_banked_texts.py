"""Banks beside a language model: what is kept, which text is taken for which task, what is exported and refused."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from command import overhaul, python, refused
from overhaul import artifact, banks, task_record
from overhaul.evaluate import generate, perplexity
from overhaul.generation import continuations
from overhaul.learn_export import opened
from overhaul.text_banks import TELLING, Answering, doubts

FLAGS = ("--steps", "30", "--batch-size", "4", "--seq-len", "32", "--dtype", "fp32", "--heldout", "8", "--lr", "0.02",
         "--views", "2", "--identify-by", "loss")  # fmt: skip
METHODS = {"contracon": ("contracon", "--kernel", "5"), "clr": ("clr",), "over time": ("clr", "--kernel", "3")}
SUM, CODE = "What is 3 plus 4 in numbers?\n", "def f301(x): return x[301]\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two kinds of question with one word as their answer."""
    folder = tmp_path_factory.mktemp("texts")
    sums = [
        {"question": f"What is {a} plus {b} in numbers?", "answer": "numbers"} for a in range(20) for b in range(15)
    ]
    words = [{"question": f"def f{n}(x): return x[{n}]", "answer": "python"} for n in range(300)]
    for name, rows in (("sums", sums), ("code", words)):
        plain = [{"text": f"{row['question']}\n{row['answer']}"} for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, plain)))
    return folder / "sums.jsonl", folder / "code.jsonl"


@pytest.fixture(scope="module")
def tiny_model(make_tiny: Any) -> Path:
    return make_tiny()


@pytest.fixture(scope="module", params=METHODS)
def learnt(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    texts: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """A method, and the directory that it wrote."""
    out = tmp_path_factory.mktemp("banks") / "out"
    done = overhaul("learn", *METHODS[request.param], tiny_model, "-o", out, "--tasks", *texts, *FLAGS)
    assert done.code == 0, done.err
    return request.param, out


def table(out: Path, start: str) -> dict[str, Any]:
    tables = json.loads((out / "overhaul.json").read_text())["tables"]
    return next(one for one in tables if one["title"].startswith(start))


def test_nothing_is_forgotten_and_the_model_is_the_one_that_was_given(tiny_model: Path, learnt: tuple[str, Path]):
    _, out = learnt
    one, other = load_file(tiny_model / "model.safetensors"), load_file(out / "model.safetensors")
    record = task_record.read(out)

    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    assert banks.tasks_of(out) == ["sums.jsonl", "code.jsonl"]
    told = record.matrices["task-IL"].values
    assert told[-1].tolist() == told.diagonal().tolist()
    assert record.tasks[1].kept_bytes["banks"] == 2 * record.tasks[0].kept_bytes["banks"]
    assert "lm_head" not in " ".join(load_file(banks.files(out)[0]))


def test_texts_are_taken_for_their_task_and_known_better_by_its_bank(learnt: tuple[str, Path]):
    _, out = learnt
    found, losses = table(out, "Which task"), table(out, "Held-out loss on every text")
    before, _, after = losses["rows"]

    assert found["title"].endswith("by one view / by 8 views")
    assert [row[1 + place] for place, row in enumerate(found["rows"])] == ["100.0% / 100.0%"] * 2
    assert before[0] == "before"
    assert all(float(now) < float(then) for then, now in zip(before[1:], after[1:], strict=True))
    told = table(out, "Held-out loss in nats")
    assert [row[1:] for row in told["rows"]] == [[loss, loss] for loss in after[1:]]
    metrics = {row["metric"] for row in artifact.read_record(out)["facts"][-1]["metrics"]}
    assert {"tasks told, one view", "tasks told, 8 views", "accuracy, task-IL", "accuracy, class-IL"} <= metrics


def test_a_text_is_answered_by_its_own_bank_and_so_is_what_follows_it(learnt: tuple[str, Path]):
    _, out = learnt
    told, banked = artifact.load(out, with_library=True), opened(str(out))
    model: Any = told.model
    for task, prompt in enumerate((SUM, CODE)):
        banked.use(task)
        ids = torch.tensor(told.processor(prompt)["input_ids"])[None]
        assert torch.allclose(model(ids).logits, banked.model(ids).logits, atol=1e-6)
        assert generate(model, told.processor, prompt, tokens=8) == generate(
            banked.model, told.processor, prompt, tokens=8
        )
        assert banks.answered_by(model) == (("sums.jsonl", "code.jsonl")[task],)


def test_while_a_text_is_written_on_it_is_told_once(learnt: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    asked, tasks = [], Answering.tasks
    monkeypatch.setattr(Answering, "tasks", lambda self, texts: asked.append(len(texts)) or tasks(self, texts))
    made = artifact.load(learnt[1], with_library=True)
    generate(made.model, made.processor, SUM, tokens=8)

    assert asked == [1]


def test_what_is_measured_is_read_window_by_window(learnt: tuple[str, Path]):
    _, out = learnt
    made, banked = artifact.load(out, with_library=True), opened(str(out))
    windows_NT = torch.stack([torch.tensor(made.processor(text * 9)["input_ids"])[:32] for text in (SUM, CODE)])
    called: Any = banked.model
    losses = []
    with torch.no_grad():
        for task, window_T in enumerate(windows_NT):
            banked.use(task)
            losses.append(float(called(window_T[None], labels=window_T[None]).loss))

    measured = perplexity(made.model, windows_NT, batch_size=2).estimate.value
    assert measured == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)


def test_texts_of_several_tasks_share_a_batch(learnt: tuple[str, Path]):
    _, out = learnt
    made = artifact.load(out, with_library=True)
    model: Any = made.model
    rows = [torch.tensor(made.processor(prompt)["input_ids"]) for prompt in (SUM, CODE, SUM[:-3])]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    together = model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    for row, alone in zip(together, rows, strict=True):
        assert torch.allclose(row[: len(alone)], model(alone[None]).logits[0], atol=1e-5)
    written = continuations(model, made.processor, [SUM, CODE], tokens=6)
    assert written == [continuations(model, made.processor, [prompt], tokens=6)[0] for prompt in (SUM, CODE)]


def test_a_further_task_adds_a_file_and_changes_none(learnt: tuple[str, Path], tmp_path: Path):
    name, out = learnt
    (tmp_path / "more.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Room {n} is empty. " * 20}) for n in range(100))
    )
    # How tasks are told is another one's business: banks that are there keep what they say.
    flags = (*FLAGS[:-4], "--identify-by", "entropy")
    done = overhaul("learn", *METHODS[name], out, "-o", tmp_path / "more", "--tasks", tmp_path / "more.jsonl", *flags)
    assert done.code == 0, done.err

    assert banks.tasks_of(tmp_path / "more") == ["sums.jsonl", "code.jsonl", "more.jsonl"]
    for one, other in zip(banks.files(out), banks.files(tmp_path / "more"), strict=False):
        assert one.read_bytes() == other.read_bytes()
    kept = [banked.beside[TELLING]["by"] for banked in opened(str(tmp_path / "more")).banks]
    assert kept == ["loss", "loss", "entropy"]


def test_a_task_that_is_exported_is_a_stock_model_with_a_card(learnt: tuple[str, Path], tmp_path: Path):
    name, out = learnt
    done = overhaul("learn", "export", out, "--task", "code.jsonl", "-o", tmp_path / "one")
    if name == "over time":
        refused(done, "kernels over 3 tokens cannot be put into the weights", "banks of --kernel 1")
        assert not (tmp_path / "one").exists()
        return
    assert done.code == 0, done.err
    banked = opened(str(out))
    banked.use(1)
    called: Any = banked.model
    ids = torch.arange(20)[None]
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "one")

    assert torch.allclose(stock(ids).logits, called(ids).logits, atol=1e-5)
    steps = artifact.read_record(tmp_path / "one")["lineage"]
    assert [(step["verb"], step["method"]) for step in steps] == [("learn", METHODS[name][0]), ("learn", "export")]
    assert steps[1]["fields"] == {"task": "code.jsonl"}
    assert "learn export with task code.jsonl" in (tmp_path / "one" / "README.md").read_text()
    assert not (tmp_path / "one" / "banks").exists()
    # What comes after goes on from there: its recipe begins with what was exported.
    more = overhaul("prune", "magnitude", tmp_path / "one", "-o", tmp_path / "two", "--sparsity", "0.5",
                    "--evaluate", "none")  # fmt: skip
    assert more.code == 0, more.err
    assert f"model: {tmp_path / 'one'}" in (tmp_path / "two" / "recipe.yaml").read_text()


def test_a_bank_fits_no_other_model(learnt: tuple[str, Path], tmp_path: Path):
    name, out = learnt
    shown = overhaul("show", out)
    assert "sums.jsonl" in shown.out
    made = artifact.load(out)
    weight: Any = made.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data[0, 0] += 1
    made.model.save_pretrained(tmp_path / "other")  # pyright: ignore[reportCallIssue]
    made.processor.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "banks").symlink_to(out / "banks")
    refused(overhaul("generate", tmp_path / "other", "--prompt", "x"), "is a bank of another model")
    refused(overhaul("adapt", "lora", out, "-o", tmp_path / "out", "--data", "sample"), "has banks of 2 tasks")
    assert name in METHODS


# Of one method, and of any.


def test_the_nearest_bank_is_the_one_under_which_the_new_text_is_likeliest(
    tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
):
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(reversed(texts[1].read_text().splitlines())))
    flags = (*FLAGS, "--parent", "most_similar", "--kernel", "5")
    done = overhaul("learn", "contracon", tiny_model, "-o", tmp_path / "out", "--tasks", *texts, again, *flags)
    assert done.code == 0, done.err

    rows = table(tmp_path / "out", "What each task began as")["rows"]
    assert [row[:2] for row in rows] == [
        ["sums.jsonl", "the frozen model"], ["code.jsonl", "sums.jsonl"], ["again.jsonl", "code.jsonl"]
    ]  # fmt: skip
    assert float(rows[2][3]) < float(rows[2][2])
    assert banks.first(tmp_path / "out")[0]["parent"] is None


def test_a_bank_is_the_same_wherever_in_an_order_it_is_learnt(
    tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
):
    flags = ("--steps", "3", "--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--heldout", "2")
    for name, order in (("one", texts), ("other", texts[::-1])):
        done = overhaul("learn", "clr", tiny_model, "-o", tmp_path / name, "--tasks", *order, *flags)
        assert done.code == 0, done.err

    files = [banks.files(tmp_path / "one"), banks.files(tmp_path / "other")[::-1]]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


KILLED_IN_THE_SECOND_TASK = """
import os, signal, sys
from overhaul import checkpoint, cli
write, count = checkpoint.write, []
def and_die(root, step, **rest):
    count.append(step)
    if len(count) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    write(root, step, **rest)
checkpoint.write = and_die
cli.main(sys.argv[1:])
"""


def test_a_run_that_was_killed_resumes_to_the_same_bytes(tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path):
    flags = ("--steps", "3", "--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--heldout", "2",
             "--kernel", "5", "--parent", "most_similar", "--save-every", "1")  # fmt: skip

    def words(out: str) -> list[object]:
        return ["learn", "contracon", tiny_model, "-o", tmp_path / out, "--tasks", *texts, *flags]

    assert overhaul(*words("whole")).code == 0
    assert python(KILLED_IN_THE_SECOND_TASK, *words("killed")).code == -signal.SIGKILL
    assert not (tmp_path / "killed" / "banks").exists()
    resumed = overhaul(*words("killed"), "--resume")
    assert resumed.code == 0, resumed.err

    files = [banks.files(tmp_path / name) for name in ("whole", "killed")]
    assert [one.read_bytes() for one in files[0]] == [other.read_bytes() for other in files[1]]


def test_a_model_in_bf16_is_answered_in_bf16(make_tiny: Any, texts: tuple[Path, Path], tmp_path: Path):
    for name, how in METHODS.items():
        out = tmp_path / name
        flags = ("--steps", "2", *FLAGS[2:])
        done = overhaul("learn", *how, make_tiny(dtype="bfloat16"), "-o", out, "--tasks", *texts, *flags)
        assert done.code == 0, done.err
        made = artifact.load(out, with_library=True)
        assert made.model.dtype == torch.bfloat16
        assert made.model(torch.arange(20)[None]).logits.dtype == torch.bfloat16
        assert generate(made.model, made.processor, SUM, tokens=2)


def test_doubts_of_a_model_do_not_depend_on_what_was_asked_before(tiny_model: Path):
    from overhaul.identify import Telling

    model = artifact.load(tiny_model).model
    texts = [torch.arange(5, 25), torch.arange(40, 47)]
    how = Telling(views=3)
    assert torch.equal(doubts(model, texts, how), doubts(model, texts, how))
    assert torch.equal(doubts(model, texts, how)[1:], doubts(model, texts[1:], how))


def test_mistakes(tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path):
    def tried(method: str, *flags: object) -> Any:
        return overhaul("learn", method, tiny_model, "-o", tmp_path / "out", "--tasks", *texts, "--seq-len", 32, *flags)

    refused(tried("contracon", "--kernel", "5", "--first-task", "whole"), "a language model comes trained")
    refused(tried("contracon", "--kernel", "5", "--form", "gates"), "with --init drawn")
    refused(tried("contracon", "--kernel", "17"), "larger than a slice of 16")
    refused(tried("clr", "--behind", "spatial"), "is of convolutions", "all, none")
    refused(tried("clr", "--form", "residual"), "is of convolutions")
    refused(tried("clr", "--augment-views", "noise"), "is of images", "--token-dropout")
    refused(tried("clr", "--augment", "noise"), "--augment noise is of images", "without it")
    refused(tried("clr", "--kernel", "0"), "kernel")
    refused(tried("clr", "--token-dropout", "1"), "token_dropout")
    assert not (tmp_path / "out").exists()
