"""MUSE's numbers: against the libraries they are defined by, one text at a time, and from the command line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command import overhaul, refused
from overhaul import artifact
from overhaul.muse import (
    Asking,
    Findings,
    Material,
    answer_of,
    examine,
    knowledge,
    log_probabilities,
    refuse_overlap,
    rouge_l,
    verbatim_memory,
)

HOW = Asking(prompt_tokens=8, tokens=12, answer_tokens=6, batch_size=4)
WORDS = ["river", "stone", "lamp", "garden", "winter", "letter", "bridge", "captain", "silver"]
FP32: dict[str, Any] = {"dtype": torch.float32}


def articles(seed: int, count: int = 9) -> list[str]:
    """Of different lengths."""
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(14, 24))) for _ in range(count)]


def asked(who: str, count: int = 5) -> list[tuple[str, str]]:
    return [(f"Where does {who} {number} live", WORDS[number]) for number in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muse")
    for seed, name in enumerate(("forget", "retain", "holdout")):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in articles(seed)))
        rows = [{"question": question, "answer": answer} for question, answer in asked(name)]
        (folder / f"{name}-qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def muse(folder: Path) -> Callable[..., Any]:
    """`muse(target, retrain, "--limit", 3)` -> the command, done."""

    def run(target: Path, retrain: Path, *flags: object, **replaced: object) -> Any:
        named: dict[str, object] = {name: folder / f"{name}.jsonl" for name in ("forget", "retain", "holdout")}
        named |= {f"{name}-questions": folder / f"{name}-qa.jsonl" for name in ("forget", "retain")}
        named |= {name.replace("_", "-"): path for name, path in replaced.items()}
        words = [word for name, path in named.items() for word in (f"--{name}", path)]
        how = ("--prompt-tokens", 8, "--tokens", 8, "--answer-tokens", 4, "--dtype", "fp32")
        return overhaul("measure", "muse", target, "--retrain", retrain, *words, *how, *flags)

    return run


def test_rouge_l_is_the_longest_common_subsequence():
    # Common: "the sat on mat", 4 of 6 and of 5 words.
    (found,) = rouge_l(["the dog sat on a mat"], ["the cat sat on mat"])
    precision, recall = 4 / 6, 4 / 5

    assert found == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    assert rouge_l(["", "Running Home"], ["nothing", "run home"]) == (0.0, pytest.approx(50.0)), "no stemming, no case"


def test_an_answer_ends_where_the_next_question_begins():
    assert answer_of(" a lamp\n\nQuestion: who") == "a lamp"
    assert answer_of(" a lamp\nQuestion") == "a lamp"
    assert answer_of("a lamp\nand more") == "a lamp\nand more"
    assert answer_of("Question: what?") == ""


def test_log_probabilities_of_many_texts_are_those_of_each_alone(tiny: Path):
    made, texts = artifact.load(tiny), articles(0)
    model: Any = made.model
    found = log_probabilities(model, made.processor, texts, batch_size=4, **FP32)

    for text, log_T in zip(texts, found, strict=True):
        ids_T = torch.tensor(made.processor(text)["input_ids"])
        with torch.no_grad():
            all_TV = model(input_ids=ids_T[None]).logits[0, :-1].log_softmax(dim=-1)
        wanted = all_TV.gather(1, ids_T[1:, None])[:, 0]
        assert torch.allclose(torch.from_numpy(log_T).float(), wanted, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_what_is_written_at_once_is_what_is_written_alone(tiny: Path, size: int):
    made, texts = artifact.load(tiny), articles(1)
    how = Asking(prompt_tokens=8, tokens=12, answer_tokens=6, batch_size=size)

    assert verbatim_memory(made.model, made.processor, texts, how, **FP32) == verbatim_memory(
        made.model, made.processor, texts, HOW, **FP32
    )
    assert knowledge(made.model, made.processor, asked("Aldo"), asked("Bert", 2), how, **FP32) == knowledge(
        made.model, made.processor, asked("Aldo"), asked("Bert", 2), HOW, **FP32
    )


def test_a_model_that_goes_on_as_the_text_does_has_all_of_it_in_memory(tiny: Path):
    made = artifact.load(tiny)
    tokenizer: Any = made.processor
    ids = tokenizer(articles(2)[0])["input_ids"][:8]
    model: Any = made.model
    written = model.generate(input_ids=torch.tensor(ids)[None], max_new_tokens=12, do_sample=False, pad_token_id=0)
    own = tokenizer.decode(written[0])
    if tokenizer(own)["input_ids"][: len(ids)] != ids or not rouge_l([own], [own])[0]:
        pytest.skip("what random weights wrote is no text that is read back as it was")

    assert verbatim_memory(made.model, tokenizer, [own], HOW, **FP32)[0] > 90


def test_the_order_of_texts_changes_no_number(tiny: Path):
    made = artifact.load(tiny)

    def found(turned: bool) -> Findings:
        parts = {name: articles(seed, 5) for seed, name in enumerate(("forget", "retain", "holdout"))}
        parts |= {"forget_questions": asked("Aldo"), "retain_questions": asked("Bert")}
        told: Any = {name: tuple(reversed(of) if turned else of) for name, of in parts.items()}
        return examine(made.model, made.processor, Material(**told, shots=()), HOW, **FP32)

    one, other = found(False), found(True)
    assert sorted(one.verbatim) == sorted(other.verbatim)
    for kind, by in one.scores.items():
        for name, of in by.items():
            assert sorted(of) == pytest.approx(sorted(other.scores[kind][name]), rel=1e-5), (kind, name)


# The command.


def test_a_retrained_model_leaks_nothing_and_what_was_asked_before_is_kept(
    muse: Callable[..., Any], tiny: Path, make_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))
    other = make_tiny(tie=False)
    third = make_tiny(bias=True)
    done = muse(tiny, other, "--unlearned", third, "--json")
    assert done.code == 0, done.err
    rows = {(Path(row["model"]).name, row["metric"]): row for row in json.loads(done.out)["rows"]}

    for metric in ("verbatim memory", "knowledge to forget", "PrivLeak", "utility", "AUC forget/holdout"):
        for name in (tiny.name, other.name, third.name):
            row = rows[name, metric]
            assert row["low"] <= row["value"] <= row["high"], row
    leak = rows[other.name, "PrivLeak"]
    assert (leak["value"], leak["low"], leak["high"]) == (0.0, 0.0, 0.0)
    (note,) = json.loads(done.out)["notes"]
    assert "PrivLeak can be from -100.0 to" in note
    assert len(json.loads(done.out)["details"]) == 3 * 3 * 10
    again = muse(tiny, other, "--unlearned", third, "--json")
    assert json.loads(again.out)["rows"] == json.loads(done.out)["rows"]
    assert again.err.count("asked before") == 2
    assert muse(tiny, other, "--answer-tokens", 5).err.count("asked before") == 0


def test_what_returns_is_what_the_commands_make_of_the_model(
    muse: Callable[..., Any], tiny: Path, make_tiny: Any, tmp_path: Path
):
    """Asked of a copy in memory, or of the directory that the command writes: the same."""
    training = {"steps": 2, "lr": 1e-3, "batch-size": 2, "seq-len": 16}
    made = {
        "int8": ("quantize", "int8"),
        "int4": ("quantize", "bct", "--mode", "w4a32", "--store", "dense"),
        "relearn": ("adapt", "full", "--data", "sample", *(w for k, v in training.items() for w in (f"--{k}", v))),
    }
    other = make_tiny(tie=False)
    for way, (verb, method, *flags) in made.items():
        done = overhaul(verb, method, other, "-o", tmp_path / way, *flags, "--evaluate", "none", "--dtype", "fp32")
        assert done.code == 0, done.err
    told = (word for name, value in training.items() for word in (f"--relearn.{name}", value))
    done = muse(
        tiny, tiny, "--unlearned", other, *(tmp_path / way for way in made), "--returns", *made, *told, "--json"
    )
    assert done.code == 0, done.err
    rows = {(Path(row["model"]).name, row["metric"]): row for row in json.loads(done.out)["rows"]}

    for way in made:
        for metric in ("verbatim memory", "knowledge to forget"):
            returned, wanted = rows[other.name, f"{metric} after {way}"], rows[way, metric]
            assert [returned[of] for of in ("value", "low", "high")] == [wanted[of] for of in ("value", "low", "high")]
    assert rows[tiny.name, "verbatim memory after int8"]["count"] == 9
    (_, *notes) = json.loads(done.out)["notes"]
    assert any("int8 was not asked after int8: the model is quantized already" in note for note in notes)


def test_what_training_reads_is_refused_where_nothing_is_trained(muse: Callable[..., Any], tiny: Path, tmp_path: Path):
    refused(muse(tiny, tiny, "--relearn.steps", 3), "relearn.steps is read where returns has relearn")
    how = ("--returns", "relearn", "--relearn.data", tmp_path / "none.txt")
    refused(muse(tiny, tiny, *how), "none.txt")


def test_bad_input_is_one_clear_error(
    muse: Callable[..., Any], tiny: Path, folder: Path, make_tiny: Any, tmp_path: Path
):
    refused(muse(tiny, tiny, holdout=folder / "forget.jsonl"), "held-out text 1 is among the texts to forget")
    refused(muse(tiny, tiny, forget_questions=folder / "forget.jsonl"), "has no question and no answer")
    refused(muse(tiny, tiny, "--prompt-tokens", 400), "of them would be given", "try: --prompt-tokens")
    refused(muse(tiny, tmp_path / "nowhere"), "there is no model")
    refused(muse(tiny, tiny, retain=tmp_path / "none.txt"), "none.txt")
    long = [{"question": "why " * 300, "answer": "so"}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    refused(muse(tiny, tiny, shots=tmp_path / "long.jsonl"), "the model reads 512", "fewer or shorter --shots")
    (tmp_path / "empty.jsonl").write_text(json.dumps({"question": "why", "answer": ""}))
    refused(muse(tiny, tiny, retain_questions=tmp_path / "empty.jsonl"), "empty.jsonl", "answer")


def saved(made: Any, out: Path) -> Path:
    made.model.save_pretrained(out)
    made.processor.save_pretrained(out)
    return out


def test_a_retrained_model_of_another_tokenizer_is_refused(muse: Callable[..., Any], tiny: Path, tmp_path: Path):
    other = artifact.load(tiny)
    other.processor.add_tokens(["<more>"])

    refused(muse(tiny, saved(other, tmp_path / "other")), "has another tokenizer than")


def test_a_model_without_a_token_that_begins_texts_is_asked_the_same(
    muse: Callable[..., Any], tiny: Path, tmp_path: Path
):
    bare = artifact.load(tiny)
    bare.processor.bos_token = None
    found = [json.loads(muse(one, one, "--json").out)["rows"] for one in (tiny, saved(bare, tmp_path / "bare"))]

    assert artifact.load(tmp_path / "bare").processor.bos_token is None
    assert [row["value"] for row in found[0]] == [row["value"] for row in found[1]]


def test_texts_that_share_half_of_their_words_in_a_row_overlap():
    text = " ".join(f"w{number}" for number in range(60))
    from overhaul.errors import UserError

    with pytest.raises(UserError, match="held-out text 2"):
        refuse_overlap([text], ["quite another", " ".join(text.split()[:40])])
    refuse_overlap([text], [" ".join(text.split()[:20] + [f"v{n}" for n in range(60)])])
