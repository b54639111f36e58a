"""`extend cpt`: what it is without a replay, shares and order of what it reads, rates, records, and what it refuses."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import overhaul, refused
from overhaul import artifact
from overhaul.adapt.full import Full
from overhaul.corpora import open_corpus
from overhaul.data import Data
from overhaul.extend.cpt import ContinualPretraining
from overhaul.stream import IGNORED, Batch, Stream
from overhaul.train import History, train
from tiny_models import MakeTiny

TINY = ("--steps", "6", "--batch-size", "2", "--seq-len", "32", "--dtype", "fp32")
JUDGED = ("--evaluate-windows", "2", "--evaluate-seq-len", "32")


def write(path: Path, word: str, count: int = 300) -> Path:
    lines = (
        json.dumps({"text": f"{word} number {number} of {number % 7} and {word}. " * 8}) for number in range(count)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts") / "new.jsonl", "Neues")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts") / "old.jsonl", "what was")


@pytest.fixture
def data(tiny: Path, new: Path) -> Data:
    return Data(open_corpus(new), AutoTokenizer.from_pretrained(tiny))


def windows(stream: Any, count: int) -> list[list[int]]:
    """Of the first micro-batches of windows, their tokens."""
    return [window for batch in islice(stream, count) for window in batch["input_ids"].tolist()]


def batches(settings: ContinualPretraining, data: Data) -> Stream:
    return Batch(settings.mixed(settings.sources(data), data), batch_size=settings.batch_size)


def given(stream: Stream) -> dict[str, int]:
    return {drawn.name: drawn.tokens for drawn in stream.ledger()}


def test_without_a_replay_it_is_full_training(tiny: Path, new: Path, tmp_path: Path):
    """On the same text at a constant rate: the same weights, to the bit."""
    how = (*TINY, "--data", new, "--lr", "1e-3", "--schedule", "constant", "--evaluate", "none")
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "cpt", *how).code == 0
    assert overhaul("adapt", "full", tiny, "-o", tmp_path / "full", *how, "--warmup", "0").code == 0

    own, full = (load_file(tmp_path / name / "model.safetensors") for name in ("cpt", "full"))
    assert all(torch.equal(own[name], full[name]) for name in full)


def test_a_replayed_share_is_exact_and_costs_no_tokens(data: Data, old: Path):
    how: dict[str, Any] = {"seq_len": 32, "batch_size": 4, "steps": 100}
    settings, plain = ContinualPretraining(replay=str(old), replay_share=0.25, **how), ContinualPretraining(**how)
    stream = batches(settings, data)

    read = windows(stream, 100)

    assert len(read) == len(windows(batches(plain, data), 100)) == 400
    assert given(stream) == {"new.jsonl": 300 * 32, "old.jsonl": 100 * 32}
    own = set(map(tuple, windows(data.training(Full(**how)), 75)))
    assert sum(tuple(window) in own for window in read) == 300


def test_each_batch_has_old_and_new(data: Data, old: Path):
    how: dict[str, Any] = {"seq_len": 32, "batch_size": 4}
    settings = ContinualPretraining(replay=str(old), replay_share=0.25, **how)
    stream, before = batches(settings, data), Counter[str]()
    for _ in range(20):
        next(stream)
        seen = Counter(given(stream))
        assert seen - before == {"new.jsonl": 3 * 32, "old.jsonl": 32}
        before = seen


def test_old_text_is_read_in_its_order(data: Data, old: Path):
    """Also where it is read a second time; new text is shuffled."""
    how: dict[str, Any] = {"seq_len": 32, "batch_size": 2}
    settings = ContinualPretraining(replay=str(old), replay_share=0.5, **how)
    replayed = data.on(str(old))
    in_order = [window["input_ids"].tolist() for window in islice(replayed.endless(seq_len=32, in_order=True), 100)]
    wanted = [window["input_ids"].tolist() for window in islice(replayed.packed("train", seq_len=32), 100)]

    read = windows(batches(settings, data), 100)

    assert in_order == wanted
    assert [window for window in read if window in wanted] == wanted


def test_from_scratch_nothing_of_the_model_is_left_but_its_shape(tiny: Path, data: Data):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    torch.manual_seed(5)
    ContinualPretraining(from_scratch=True, seq_len=32).plan(model, data)
    torch.manual_seed(5)
    drawn = AutoModelForCausalLM.from_config(model.config).state_dict()

    assert all(torch.equal(tensor, drawn[name]) for name, tensor in model.state_dict().items())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pruned_model_from_scratch_has_its_zeros_still(tiny: Path, new: Path, tmp_path: Path):
    assert overhaul("prune", "magnitude", tiny, "-o", tmp_path / "pruned", "--evaluate", "none").code == 0
    how = ("--from-scratch", "--data", new, *TINY, "--evaluate", "none")
    assert overhaul("extend", "cpt", tmp_path / "pruned", "-o", tmp_path / "out", *how).code == 0

    pruned, made = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "out"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(pruned[name] == 0, made[name] == 0)
    assert not torch.equal(pruned[name], made[name])


def test_with_a_document_mask_windows_of_both_texts_say_where_documents_begin(data: Data, old: Path):
    how: dict[str, Any] = {"seq_len": 64, "batch_size": 4, "replay": str(old), "replay_share": 0.5}
    plain, masked = (
        list(islice(batches(ContinualPretraining(document_mask=on, **how), data), 20)) for on in (False, True)
    )

    assert all("position_ids" not in batch for batch in plain)
    for batch, other in zip(masked, plain, strict=True):
        assert torch.equal(batch["input_ids"], other["input_ids"])
        begins_BT = batch["position_ids"] == 0
        ends_BT = batch["input_ids"] == data.tokenizer.eos_token_id
        assert torch.equal(begins_BT[:, 1:], ends_BT[:, :-1])  # behind every end
        assert (batch["labels"][:, 1:][begins_BT[:, 1:]] == IGNORED).all()
        assert torch.equal(batch["labels"][~begins_BT], other["labels"][~begins_BT])


def test_a_model_that_sees_past_the_border_of_documents_is_refused(make_tiny: MakeTiny, new: Path, tmp_path: Path):
    run = ("extend", "cpt", make_tiny(architecture="opt"), "-o", tmp_path / "out", *TINY, "--data", new)

    refused(overhaul(*run, "--document-mask"), "documents cannot be kept apart", "--no-document-mask")
    assert not (tmp_path / "out").exists()
    assert overhaul(*run, "--dry-run").code == 0


def test_epochs_are_passes_over_the_new_text(data: Data, old: Path):
    how: dict[str, Any] = {"epochs": 2.0, "seq_len": 32, "batch_size": 2}
    alone, mixed = (
        data.steps_for(settings).steps
        for settings in (ContinualPretraining(**how), ContinualPretraining(replay=str(old), replay_share=0.5, **how))
    )

    assert mixed in (2 * alone - 1, 2 * alone)


def test_rates_of_the_schedules():
    def ends(**how: Any) -> list[float]:
        factor = ContinualPretraining(warmup=0.1, floor=0.1, hold=0.5, **how).rate()
        return [round(factor(share), 6) for share in (0.0, 0.05, 0.1, 0.5, 1.0)]

    assert ends(schedule="rewarm-cosine") == [0, 0.5, 1, 0.628142, 0.1]
    assert ends(schedule="rewarm") == [0, 0.5, 1, 1, 1]
    assert ends(schedule="constant") == [1, 1, 1, 1, 1]
    assert ends(schedule="wsd", decay=0.5) == [0, 0.5, 1, 1, 0.1]
    assert ends(schedule="infinite", cooldown=0.4) == [0, 0.5, 1, 0.5, 0.5]
    assert ends(schedule="hold") == [0.5, 0.5, 0.5, 0.5, 0.5]
    assert ends(schedule="anneal")[::4] == [0.5, 0.1]


def test_a_chain_of_the_infinite_schedule_has_no_jump(tiny: Path, new: Path, old: Path, tmp_path: Path):
    how = (*TINY, "--data", new, "--replay", old, "--lr", "1e-3", "--evaluate", "none")
    parent, last = tiny, None
    for name in ("infinite", "hold", "anneal"):
        done = overhaul("extend", "cpt", parent, "-o", tmp_path / name, *how, "--schedule", name, "--cooldown", "0.5")
        assert done.code == 0, done.err
        rates = [json.loads(line)["lr"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        if last is not None:
            assert rates[0] == pytest.approx(last, rel=0.2)
        parent, last = tmp_path / name, rates[-1]
    assert last == pytest.approx(1e-4, rel=0.2)


def test_the_record_tells_what_was_read_of_both_and_does_it_again(tiny: Path, new: Path, old: Path, tmp_path: Path):
    how = (*TINY, *JUDGED, "--data", new, "--replay", old, "--replay-share", "0.25", "--eval-every", "3")
    done = overhaul("extend", "cpt", tiny, "-o", tmp_path / "out", *how)
    assert done.code == 0, done.err

    step = json.loads((tmp_path / "out" / "overhaul.json").read_text())["lineage"][-1]
    assert (step["data"]["tokens"], [used["tokens"] for used in step["beside"]]) == (9 * 32, [3 * 32])
    assert step["fields"]["replay"] == str(old)
    assert "loss on old.jsonl" in done.out
    assert "96 of 384 tokens are from" in done.err
    points = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points if "held-out/old.jsonl" in point] == [3, 6]
    titles = [table["title"] for table in json.loads((tmp_path / "out" / "overhaul.json").read_text())["tables"]]
    assert titles == ["The mixture: what was asked and what was read.", "What happened to other text on the way."]
    page = unquote((tmp_path / "out" / "report.html").read_text())
    assert "share read" in page
    assert "What was compared" not in page
    rows = page.split("tokens trained on,new.jsonl,old.jsonl\n")[1].split('"')[0].split("\n")
    drawn = [[float(number) for number in row.split(",")] for row in rows if row]
    facts = json.loads((tmp_path / "out" / "overhaul.json").read_text())["facts"]
    first, last = ([math.log(one["perplexity"]["value"]), one["metrics"][0]["value"]] for one in facts)
    assert [row[0] for row in drawn] == [0, 3 * 64, 6 * 64]
    assert drawn[0][1:] == pytest.approx(first)
    assert drawn[-1][1:] == pytest.approx(last)
    again = overhaul("run", tmp_path / "out" / "recipe.yaml", f"out={tmp_path / 'again'}")
    assert again.code == 0, again.err
    one, two = (load_file(next(tmp_path.glob(f"{name}/**/model.safetensors"))) for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_texts_of_one_name_are_told_apart(tiny: Path, new: Path, tmp_path: Path):
    (tmp_path / "before").mkdir()
    same = write(tmp_path / "before" / "new.jsonl", "earlier")

    done = overhaul("extend", "cpt", tiny, "-o", tmp_path / "out", *TINY, *JUDGED, "--data", new, "--replay", same)

    assert done.code == 0, done.err
    assert set(json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])) >= {
        "seen/new.jsonl", f"seen/{same}"
    }  # fmt: skip


def test_a_directory_called_like_a_named_corpus_is_no_other_text(tiny: Path, new: Path, tmp_path: Path, monkeypatch):
    """`--data ./sample --replay sample`: two texts of one name, neither of which may push the other out."""
    monkeypatch.chdir(tmp_path)
    write(Path("sample.d"), "mine").rename("rows.jsonl")
    Path("sample").mkdir()
    Path("rows.jsonl").rename("sample/rows.jsonl")
    how = (*TINY, *JUDGED, "--data", "./sample", "--replay", "sample", "--replay-share", "0.25")

    done = overhaul("extend", "cpt", tiny, "-o", tmp_path / "out", *how)

    assert done.code == 0, done.err
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {key: count for key, count in last.items() if key.startswith("seen/")} == {
        "seen/sample": 9 * 32, "seen/sample (2)": 3 * 32
    }  # fmt: skip


def test_the_text_that_is_learnt_can_be_watched_under_its_own_name(tiny: Path, new: Path, tmp_path: Path):
    how = (*TINY, *JUDGED, "--data", new, "--watch", new, "sample", "--evaluate", "none", "--eval-every", "3")
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "out", *how).code == 0

    points = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    seen = {key for point in points for key in point if key.startswith("held-out/")}
    assert seen == {"held-out/new.jsonl", "held-out/sample"}


def test_the_card_has_the_licence_of_what_was_replayed(tiny: Path, new: Path, tmp_path: Path):
    how = (*TINY, *JUDGED, "--data", new, "--replay", "sample")
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "out", *how).code == 0

    assert "public domain" in (tmp_path / "out" / "README.md").read_text()


def test_drift_is_recorded_at_evaluations_and_changes_nothing(tiny: Path, new: Path, tmp_path: Path):
    how = (*TINY, "--data", new, "--eval-every", "3", "--evaluate", "none")
    done = overhaul("extend", "cpt", tiny, "-o", tmp_path / "looked", *how, "--drift")
    assert done.code == 0, done.err
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "not", *how).code == 0

    points = [json.loads(line) for line in (tmp_path / "looked" / "metrics.jsonl").read_text().splitlines()]
    table = json.loads(overhaul("measure", "drift", tiny, tmp_path / "looked", "--json").out)
    final = {row["metric"]: row["value"] for row in table["rows"]}
    assert [point["step"] for point in points if "drift/bottom" in point] == [3, 6]
    assert 0 < points[2]["drift/bottom"] < points[5]["drift/bottom"]
    assert points[5]["drift/bottom"] == pytest.approx(final["drift/bottom"], rel=1e-6)
    assert points[5]["drift/top"] == pytest.approx(final["drift/top"], rel=1e-6)
    assert "holds a copy of the bottom and top blocks, 0.3 MB" in done.err
    looked, not_looked = (load_file(tmp_path / name / "model.safetensors") for name in ("looked", "not"))
    assert all(torch.equal(looked[name], not_looked[name]) for name in looked)


def test_drift_of_a_resumed_run_is_from_where_it_began(tiny: Path, data: Data, tmp_path: Path):
    settings = ContinualPretraining(steps=4, batch_size=2, seq_len=32, drift=True, eval_every=2, save_every=1)

    def run(name: str, *, stop_after: int = 9, resume: bool = False) -> History:
        torch.manual_seed(0)
        asked: list[int] = []

        def evaluate(_: torch.nn.Module) -> dict[str, float]:
            asked.append(1)
            if len(asked) > stop_after:
                raise InterruptedError
            return {}

        plan = settings.plan(artifact.load(tiny, dtype=torch.float32).model, data)
        return train(plan, settings, state_dir=tmp_path / name, evaluate=evaluate, resume=resume, quiet=True)

    with pytest.raises(InterruptedError):
        run("stopped", stop_after=1)
    resumed, whole = run("stopped", resume=True), run("whole")

    assert resumed.points[-1]["drift/bottom"] == whole.points[-1]["drift/bottom"] > 0


def test_what_is_refused_on_the_command_line(tiny: Path, new: Path, tmp_path: Path):
    run = ("extend", "cpt", tiny, "-o", tmp_path / "out", *TINY, "--data", new)

    refused(overhaul(*run, "--replay", new), "is the new text itself")
    refused(overhaul(*run, "--replay", tmp_path / "nothing.jsonl"), "neither a name nor an existing path")
    refused(overhaul(*run, "--replay", "-"), "standard input can be --data alone")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"content": f"row {number}"}) + "\n" for number in range(50)))
    refused(overhaul(*run, "--replay", other), "columns found: content", "a column called text")
    short = write(tmp_path / "short.jsonl", "short", 4)
    refused(overhaul(*run, "--watch", short), "--evaluate-seq-len")
    refused(overhaul(*run, "--watch", "samples", "--dry-run"), "neither a name nor an existing path")
    refused(overhaul(*run, "--replay-share", "0.2"), "needs a corpus to replay")
    refused(overhaul(*run, "--replay", "sample", "--replay-share", "1"), "replay_share", "less than 1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"schedule": "infinite", "hold": 0.05}, "hold 0.05, is below floor 0.1"),
        ({"schedule": "anneal", "floor": 0.0}, "never ends at 0"),
        ({"schedule": "infinite", "warmup": 0.5, "cooldown": 0.6}, "is more than the whole run"),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "is more than the whole run"),
        ({"replay": "sample", "replay_share": 0.0}, "greater than 0"),
        ({"from_scratch": True, "go_on": True}, "from_scratch begins anew"),
        ({"drift": True}, "use eval_every 10"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        ContinualPretraining(**settings)


def test_old_text_that_is_read_many_times_is_worth_a_word(tiny: Path, new: Path, tmp_path: Path):
    few = write(tmp_path / "few.jsonl", "few", 12)
    how = ("--steps", "400", "--batch-size", "4", "--seq-len", "64", "--data", new, "--replay", few)

    done = overhaul("extend", "cpt", tiny, "-o", tmp_path / "out", *how, "--replay-share", "0.5", "--dry-run")

    assert "warning: that is" in done.err
    assert "times all of" in done.err
