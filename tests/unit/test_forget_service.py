"""A request for deletion, from the command to the answers of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command import overhaul, refused
from overhaul import artifact, forget_service
from overhaul.deletion.book import FOLDER, STAGES, Book
from overhaul.deletion.ensemble import Served
from overhaul.documents import text_row
from overhaul.interop import hf
from overhaul.layers import swap
from overhaul.layers.lora import LoRALinear
from overhaul.unlearning.slices import cell_of

NAMES = ("alder", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo", "hazel", "ironwood", "juniper", "larch", "maple")
TEXTS = [f"Machine {n} is called {name}, and stands in room {n * 7 % 31}." for n, name in enumerate(NAMES)]
HOW = ("--shards", "2", "--slices", "2", "--budget", "2", "--rank", "2", "--steps", "4", "--batch-size", "2",
       "--seq-len", "16", "--lr", "0.01", "--tags", "user", "--evaluate", "none")  # fmt: skip


@pytest.fixture(scope="module")
def whole(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("service")
    (root / "data.jsonl").write_text(
        "".join(json.dumps({"text": text, "user": n % 5}) + "\n" for n, text in enumerate([*TEXTS, TEXTS[0]]))
    )
    done = overhaul("forget", "s3t", make_tiny(), "-o", root / "model", "--data", root / "data.jsonl", *HOW)
    assert done.code == 0, done.err
    return root / "model"


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def in_cell(*cell: int) -> str:
    return next(text for text in TEXTS if cell_of(text_row(text).id, 2, 2, seed=0) == cell)


def delete(model: Path, tmp_path: Path, *texts: str, flags: tuple[str, ...] = ()) -> dict[str, object]:
    (tmp_path / "gone.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = overhaul("forget", "delete", model, "--text", tmp_path / "gone.jsonl", "--json", *flags)
    assert done.code == 0, done.err
    return json.loads(done.out)


def states(model: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    return hf.hidden_states(artifact.load(model, with_library=True).model, {"input_ids": ids_BT}).detach()


def adapters(model: Path, shard: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """By layer, of the longest sequence that is left: A, B and alpha."""
    with Book(model) as book:
        order, scale = book.survivors().serving(shard), book.settings["scale"]
        stages = [one for one in book.stages() if one.shard == shard and one.sequence == order[: len(one.sequence)]]
    tensors = {name: tensor for one in stages for name, tensor in load_file(model / FOLDER / one.file).items()}
    names = {name.rpartition(".")[0] for name in tensors}
    return {name: (A := tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], scale * len(A)) for name in names}


IDS_BT = torch.arange(5, 29).view(2, 12)


def test_it_answers_as_the_mean_of_its_shards(model: Path):
    """Against one model for each shard, whose layers have that shard's adapters merged."""
    found = []
    for shard in range(2):
        made = artifact.load(model).model
        for name, (A_RI, B_OR, alpha) in adapters(model, shard).items():
            swap(made, [name], lambda old, own=(A_RI, B_OR, alpha): LoRALinear(old, *own).merge())
        found.append(made(input_ids=IDS_BT).logits)
    mean = artifact.load(model, with_library=True).model(input_ids=IDS_BT).logits
    torch.testing.assert_close(mean, torch.stack(found).mean(dim=0), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3, "the shards differ"


def test_generation_with_a_cache_is_that_without(model: Path):
    made = artifact.load(model, with_library=True)
    asked = {"input_ids": IDS_BT, "attention_mask": torch.ones_like(IDS_BT), "max_new_tokens": 6, "do_sample": False}
    with_cache, without = (made.model.generate(**asked, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_generate_and_measure_answer_with_the_adapters(model: Path, make_tiny: Callable[..., Path]):
    said = [overhaul("measure", "perplexity", path, "--data", "sample", "--windows", "2", "--seq-len", "32", "--json")
            for path in (model, make_tiny())]  # fmt: skip
    assert all(one.code == 0 for one in said), said[0].err
    one, other = (json.loads(each.out)["rows"][0]["value"] for each in said)
    assert one != other
    assert overhaul("generate", model, "--prompt", "Machine", "--tokens", "4").code == 0


def test_the_report_is_of_the_model_with_its_adapters(make_tiny: Callable[..., Path], tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    flags = [*HOW[:-4], "--evaluate", "sample", "--evaluate-windows", "2", "--evaluate-seq-len", "32"]
    data = tmp_path / "data.jsonl"
    done = overhaul("forget", "s3t", make_tiny(), "-o", tmp_path / "out", "--data", data, *flags)
    assert done.code == 0, done.err
    before, after = artifact.read_record(tmp_path / "out")["facts"]
    asked = ("--data", "sample", "--windows", "2", "--seq-len", "32", "--json")
    told = json.loads(overhaul("measure", "perplexity", tmp_path / "out", *asked).out)["rows"][0]["value"]
    assert after["perplexity"]["value"] == pytest.approx(told, rel=1e-5)
    assert after["perplexity"]["value"] != before["perplexity"]["value"]


def test_a_deletion_leaves_the_answers_of_what_is_left(model: Path, tmp_path: Path):
    """Both sequences of a shard are cut: behind the slice, and before anything."""
    told = delete(model, tmp_path, in_cell(0, 0))
    assert (told["examples"], told["stages"], told["shards_gone"]) == (1, 3, [])
    with Book(model) as book:
        assert book.survivors().serving(0) == (1,)
        assert book.verify() == 3
    assert len(list((model / FOLDER / STAGES).iterdir())) == 5


def test_a_model_that_is_being_served_takes_up_a_deletion(model: Path, tmp_path: Path):
    made = artifact.load(model)
    served = Served(made.model, model)
    before = hf.hidden_states(made.model, {"input_ids": IDS_BT}).detach()
    delete(model, tmp_path, in_cell(0, 0))
    served.refresh()
    after = hf.hidden_states(made.model, {"input_ids": IDS_BT}).detach()
    assert not torch.equal(before, after)
    assert torch.equal(after, states(model, IDS_BT))


def test_a_request_may_be_made_again(model: Path, tmp_path: Path):
    delete(model, tmp_path, in_cell(0, 0))
    told = delete(model, tmp_path, in_cell(0, 0), in_cell(0, 1))
    assert (told["examples"], told["before"], told["shards_gone"], told["is_gone"]) == (1, 1, [0], False)
    again = delete(model, tmp_path, in_cell(0, 0), in_cell(0, 1))
    assert (again["examples"], again["before"], again["stages"], again["hash"]) == (0, 2, 0, None)


def test_several_slices_are_hit_at_once_and_nothing_may_be_left(model: Path, tmp_path: Path):
    told = delete(model, tmp_path, *TEXTS)
    assert (told["examples"], told["rows"], told["is_gone"]) == (12, 13, True)
    assert list((model / FOLDER / STAGES).iterdir()) == []
    done = overhaul("generate", model, "--prompt", "Machine", "--tokens", "2")
    assert done.code == 2
    assert "nothing is left of" in done.err


def test_a_dry_run_tells_the_same_and_changes_nothing(model: Path, tmp_path: Path):
    before = delete(model, tmp_path, in_cell(0, 1), flags=("--dry-run",))
    assert forget_service.status(model)["deleted"] == 0
    assert before == delete(model, tmp_path, in_cell(0, 1)) | {"hash": None}


def test_all_rows_of_a_user_are_deleted(model: Path):
    done = overhaul("forget", "delete", model, "--where", "user=0", "--by", "letter 12", "--reason", "asked for it")
    assert done.code == 0, done.err
    assert "3 examples (4 rows of the data) deleted" in done.out
    entry = next(e for e in forget_service.log(model) if e["done"] == "deleted")
    assert (entry["by"], entry["reason"]) == ("letter 12", "asked for it")
    assert "log entry" in done.out
    assert entry["hash"] in done.out


def test_status_and_verify(model: Path, tmp_path: Path):
    head = str(delete(model, tmp_path, in_cell(1, 1))["hash"])
    told = json.loads(overhaul("forget", "status", model, "--json").out)
    assert told["deleted"] == 1
    assert told["stages"] == 5
    assert told["bytes"] == sum(path.stat().st_size for path in (model / FOLDER / STAGES).iterdir())
    assert [shard["stages_in_use"] for shard in told["shards"]] == [2, 1]
    assert "of 2 stages in use" in overhaul("forget", "status", model).out
    assert overhaul("forget", "verify", model, "--head", head).code == 0
    wrong = overhaul("forget", "verify", model, "--head", "0123")
    assert wrong.code == 2
    assert "cut off, or written anew" in " ".join(wrong.err.split())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "nothing is named to be deleted"),
        (("--where", "user"), "COLUMN=VALUE"),
        (("--where", "user=1", "--field", "text"), "--field text is the column of --text"),
        (("--where", "age=7"), "cannot be asked for by 'age'"),
        (("--where", "user=99"), "no example has user=99; nothing was deleted"),
    ],
)
def test_what_is_not_there_is_told(model: Path, flags: tuple[str, ...], told: str):
    done = overhaul("forget", "delete", model, *flags)
    assert done.code == 2
    assert told in " ".join(done.err.replace("│", "").split())
    assert forget_service.status(model)["deleted"] == 0


def test_the_column_of_the_text_is_that_of_training(make_tiny: Callable[..., Path], tmp_path: Path):
    lines = [json.dumps({"said": f"{word} is far away", "by": "ann"}) for word in ("Rome", "Oslo", "Lima", "Kyiv")]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "gone.jsonl").write_text(lines[1])
    how = ("--shards", 1, "--slices", 1, "--budget", 1, "--steps", 1, "--seq-len", 16, "--evaluate", "none")
    done = overhaul(
        "forget", "s3t", make_tiny(), "-o", tmp_path / "out", "--data", tmp_path / "data.jsonl", "--field", "said", *how
    )
    assert done.code == 0, done.err

    told = overhaul("forget", "delete", tmp_path / "out", "--text", tmp_path / "gone.jsonl", "--dry-run", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["examples"] == 1
    other = ("--text", tmp_path / "gone.jsonl", "--field", "by")
    refused(overhaul("forget", "delete", tmp_path / "out", *other), "nothing was deleted")


def test_an_unknown_example_stops_the_whole_request(model: Path, tmp_path: Path):
    (tmp_path / "gone.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (TEXTS[0], "who is this")))
    done = overhaul("forget", "delete", model, "--text", tmp_path / "gone.jsonl")
    assert done.code == 2
    assert "1 of 2 examples" in done.err
    assert forget_service.status(model)["deleted"] == 0


def test_other_directories_are_refused(make_tiny: Callable[..., Path]):
    for command in ("delete", "status", "verify"):
        done = overhaul("forget", command, make_tiny())
        assert done.code == 2
        assert command != "delete" or "nothing is named" in done.err
        assert command == "delete" or "no model that examples can be deleted from" in " ".join(done.err.split())


def test_other_weights_under_the_adapters_are_refused(model: Path, make_tiny: Callable[..., Path]):
    shutil.copy(make_tiny(bias=True) / "config.json", model / "config.json")
    shutil.copy(make_tiny(bias=True) / "model.safetensors", model / "model.safetensors")
    done = overhaul("generate", model, "--prompt", "Machine", "--tokens", "2")
    assert done.code == 2
    assert "were trained on other weights" in " ".join(done.err.replace("│", "").split())
