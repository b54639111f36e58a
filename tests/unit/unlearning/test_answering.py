"""Classes of texts that examples can be deleted from: each stage has a head of its own, which goes where it goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from command import interrupted, overhaul, refused
from overhaul import artifact, forget_service
from overhaul.deletion.book import FOLDER, STAGES
from overhaul.deletion.ensemble import Served
from overhaul.documents import labelled_row
from overhaul.interop.classifier import classes_of
from overhaul.kinds import Kind
from overhaul.unlearning.slices import cell_of
from services import merge_stages, same, stages_of

NAMES = ("alder", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo", "hazel", "ironwood", "juniper", "larch", "maple")
LABELS = ("hall", "shed", "yard")
EXAMPLES = [(f"Machine {n} is called {name}.", LABELS[n % 3]) for n, name in enumerate((*NAMES, *reversed(NAMES)))]
HOW = ("--label-field", "place", "--shards", "2", "--slices", "2", "--budget", "2", "--rank", "2", "--steps", "3",
       "--batch-size", "2", "--seq-len", "16", "--lr", "0.01")  # fmt: skip
DECLARED = ("--classes", *LABELS)
BASES = ("llama", "bert")

Examples = Iterable[tuple[str, str]]


def written(path: Path, examples: Examples) -> Path:
    path.write_text("".join(json.dumps({"text": text, "place": label}) + "\n" for text, label in examples))
    return path


@pytest.fixture(scope="module")
def base_of(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`base_of("bert")` -> the directory of a model without classes."""

    def of(name: str) -> Path:
        if name == "llama":
            return make_tiny()
        out = tmp_path_factory.mktemp("bases") / name
        tokenizer = AutoTokenizer.from_pretrained(make_tiny())
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        ends = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(0)
        BertModel(BertConfig(num_hidden_layers=2, **sizes, **ends)).save_pretrained(out)
        tokenizer.save_pretrained(out)
        return out

    return of


@pytest.fixture(scope="module")
def trained(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained("llama", examples)` -> the directory that `forget s3t` wrote of some, in this order."""
    made: dict[tuple[object, ...], Path] = {}
    root = tmp_path_factory.mktemp("classes")

    def of(base: str = "llama", examples: Sequence[tuple[str, str]] = EXAMPLES, *flags: str) -> Path:
        key = (base, *examples, *flags)
        if key not in made:
            out, data = root / f"{len(made)}", written(root / f"{len(made)}.jsonl", examples)
            done = overhaul("forget", "s3t", base_of(base), "-o", out, "--data", data, *HOW, *DECLARED, *flags)
            assert done.code == 0, done.err
            made[key] = out
        return made[key]

    return of


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path, str], Path]:
    """`copied(directory, name)` -> a copy that may be changed."""
    return lambda directory, name: Path(shutil.copytree(directory, tmp_path / name))


def cell(example: tuple[str, str]) -> tuple[int, int]:
    return cell_of(labelled_row(*example).id, 2, 2, seed=0)


def in_cell(*wanted: int) -> list[tuple[str, str]]:
    return [example for example in EXAMPLES if cell(example) == wanted]


def deleted(directory: Path, *examples: tuple[str, str]) -> dict[str, Any]:
    gone = written(directory.with_name(f"{directory.name}-gone.jsonl"), examples)
    done = overhaul("forget", "delete", directory, "--text", gone, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def logits(directory: Path, *, served: bool = True) -> Tensor:
    made = artifact.load(directory, kinds=(Kind.TEXT_CLASSIFIER,), with_library=served)
    return answers(made.model, made.processor)


@torch.no_grad()
def answers(model: Any, tokenizer: Any) -> Tensor:
    return model(**tokenizer([text for text, _ in EXAMPLES], padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("base", BASES)
def test_a_deletion_leaves_tensors_and_logits_that_are_trained_without_the_example(
    trained: Callable[..., Path], copied: Callable[[Path, str], Path], base: str
):
    """Bit for bit, heads included: the other run never saw it. Of that another one is deleted, of the same slice."""
    gone, other, *_ = in_cell(0, 1)
    whole = copied(trained(base), "whole")
    rest = copied(trained(base, [example for example in reversed(EXAMPLES) if example != gone]), "rest")
    assert not torch.equal(logits(whole), logits(rest)), "what was trained with it differs: the test can fail"

    deleted(whole, gone)
    deleted(rest, other)
    before, after = stages_of(whole), stages_of(rest)
    assert before.keys() == after.keys() == {(0, (0,)), *((1, order) for order in [(0,), (0, 1), (1,), (1, 0)])}
    assert all(same(before[key], after[key]) for key in before)
    assert torch.equal(logits(whole), logits(rest))


def test_the_head_is_that_of_the_last_stage_that_is_left(
    trained: Callable[..., Path], copied: Callable[[Path, str], Path]
):
    """Of a sequence 0, 1 that loses slice 1; the head that stage (0, 1) trained has seen what was deleted."""
    model = copied(trained(), "model")
    before = stages_of(model)
    assert before.keys() == {(shard, order) for shard in range(2) for order in [(0,), (0, 1), (1,), (1, 0)]}
    heads = {key: tensors["score.weight"] for key, tensors in before.items()}
    assert len({tuple(head.flatten().tolist()) for head in heads.values()}) == 8, "each stage has its own"

    made = artifact.load(model, kinds=(Kind.TEXT_CLASSIFIER,))
    served = Served(made.model, model)
    inner: Any = made.model
    assert torch.equal(inner.score.own["weight"], torch.stack([heads[0, (0, 1)], heads[1, (0, 1)]]))
    deleted(model, in_cell(0, 1)[0])
    served.refresh()
    assert torch.equal(inner.score.own["weight"], torch.stack([heads[0, (0,)], heads[1, (0, 1)]]))
    assert torch.equal(answers(made.model, made.processor), logits(model)), "a model that is served takes it up"


@pytest.mark.parametrize("base", BASES)
def test_logits_are_the_mean_of_one_classifier_for_each_shard(trained: Callable[..., Path], base: str):
    """Plain transformers, each with one shard's adapters merged and its last head."""
    directory, found = trained(base), []
    for shard in range(2):
        model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        merge_stages(model, directory, (0,), (0, 1), shard=shard)
        found.append(answers(model, AutoTokenizer.from_pretrained(directory)))
    torch.testing.assert_close(logits(directory), torch.stack(found).mean(dim=0), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3, "the shards differ"


def test_accuracy_is_that_of_the_mean(trained: Callable[..., Path], tmp_path: Path):
    """Texts in batches of their own widths, as they are measured, against all at once."""
    directory, table = trained("llama", EXAMPLES, "--dtype", "fp32"), written(tmp_path / "data.jsonl", EXAMPLES)
    how = ("--task", table, "--label-field", "place", "--dtype", "fp32", "--json")
    told = json.loads(overhaul("measure", "accuracy", directory, *how).out)
    wanted = [LABELS[place] for place in logits(directory).argmax(dim=1)]
    assert [detail["answer"] for detail in told["details"]] == wanted
    assert told["rows"][0]["value"] == sum(a == b for a, (_, b) in zip(wanted, EXAMPLES, strict=True)) / len(wanted)


def test_a_language_model_tells_no_classes(make_tiny: Callable[..., Path], tmp_path: Path):
    data, out = written(tmp_path / "data.jsonl", EXAMPLES), tmp_path / "out"
    how = ("--shards", 1, "--slices", 2, "--budget", 1, "--steps", 1, "--seq-len", 16, "--evaluate", "none")
    done = overhaul("forget", "s3t", make_tiny(), "-o", out, "--data", data, *how)
    assert done.code == 0, done.err
    task = ("--task", data, "--label-field", "place")
    refused(overhaul("measure", "accuracy", out, *task), "is a model of another kind: causal language model")


def test_a_head_goes_on_from_the_stage_before(trained: Callable[..., Path]):
    """With a rate of almost nothing every stage of a sequence has the head that the first one drew."""
    heads = {
        key: tensors["score.weight"] for key, tensors in stages_of(trained("llama", EXAMPLES, "--lr", "1e-12")).items()
    }
    for shard in range(2):
        torch.testing.assert_close(heads[shard, (0, 1)], heads[shard, (0,)])
        assert (heads[shard, (1,)] - heads[shard, (0,)]).abs().max() > 1e-2


def test_bytes_are_those_of_adapters_and_heads(trained: Callable[..., Path], copied: Callable[[Path, str], Path]):
    """Of every stage, fp32: rank times inputs and outputs of each layer of its block, and classes times width."""
    model = copied(trained(), "model")
    bare = artifact.load(model, kinds=(Kind.TEXT_CLASSIFIER,)).model
    per_block = sum(2 * sum(layer.weight.shape) for name, layer in bare.named_modules()
                    if name.startswith("model.layers.0.") and isinstance(layer, torch.nn.Linear))  # fmt: skip

    def without_headers() -> int:
        files = (model / FOLDER / STAGES).iterdir()
        sizes = [(file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")) for file in files]
        assert forget_service.status(model)["bytes"] == sum(size for size, _ in sizes)
        return sum(size - 8 - header for size, header in sizes)

    assert without_headers() == 8 * 4 * (per_block + 3 * 64)
    assert deleted(model, in_cell(0, 1)[0])["stages"] == 3
    assert without_headers() == 5 * 4 * (per_block + 3 * 64)
    assert forget_service.verify(model)["stages"] == 5


def test_a_run_that_is_resumed_has_the_same_adapters_and_heads(
    base_of: Callable[[str], Path], trained: Callable[..., Path], tmp_path: Path
):
    """It is stopped in the second stage of a sequence, whose head goes on from that of the first."""
    data, out = written(tmp_path / "data.jsonl", EXAMPLES), tmp_path / "out"
    words = ("forget", "s3t", base_of("bert"), "-o", out, "--data", data, *HOW, *DECLARED, "--save-every", "1")
    assert interrupted(lambda seen: len(seen) == 5, *words).code != 0
    done = overhaul(*words, "--resume")
    assert done.code == 0, done.err
    whole, resumed = stages_of(trained("bert")), stages_of(out)
    assert whole.keys() == resumed.keys()
    assert all(same(whole[key], resumed[key]) for key in whole)


def test_a_request_may_be_made_again_until_nothing_is_left(
    trained: Callable[..., Path], copied: Callable[[Path, str], Path]
):
    model = copied(trained(), "model")
    assert deleted(model, EXAMPLES[0])["examples"] == 1
    assert deleted(model, EXAMPLES[0]) | {"shards_gone": []} == {
        "examples": 0, "before": 1, "rows": 0, "stages": 0, "shards_gone": [], "is_gone": False, "hash": None
    }  # fmt: skip
    assert deleted(model, *EXAMPLES)["is_gone"]
    with pytest.raises(artifact.UserError, match="nothing is left of"):
        logits(model)
    assert logits(model, served=False).abs().max() == 0, "the head beside the weights has seen nothing"


def test_a_text_under_two_labels_is_two_examples(trained: Callable[..., Path], copied: Callable[[Path, str], Path]):
    text = EXAMPLES[0][0]
    model = copied(trained("llama", [*EXAMPLES, (text, "yard")]), "model")
    assert deleted(model, (text, "yard"))["examples"] == 1
    assert deleted(model, (text, "hall"))["examples"] == 1
    gone = written(model.with_name("shed.jsonl"), [(text, "shed")])
    refused(overhaul("forget", "delete", model, "--text", gone), "1 of 1 examples")


def test_states_that_are_kept_change_nothing_but_the_time(trained: Callable[..., Path]):
    kept, whole = (stages_of(trained("llama", EXAMPLES, "--dtype", "fp32", flag)) for flag in ("--cache", "--no-cache"))
    for key, tensors in kept.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, whole[key][name], rtol=1e-3, atol=1e-4)


def test_a_classifier_brings_its_classes_and_keeps_its_head(base_of: Callable[[str], Path], tmp_path: Path):
    """One that learnt other examples before, in the usual way."""
    data, learnt, out = written(tmp_path / "data.jsonl", EXAMPLES), tmp_path / "learnt", tmp_path / "out"
    how = ("--tasks", data, "--label-field", "place", "--steps", 1, "--seq-len", 16)
    done = overhaul("learn", "bregman", base_of("llama"), "-o", learnt, *how)
    assert done.code == 0, done.err
    refused(
        overhaul("forget", "s3t", learnt, "-o", out, "--data", data, *HOW, "--classes", "shed", "hall", "yard"),
        "--classes shed hall yard are not those of", "hall, shed, yard, in this order",
    )  # fmt: skip
    done = overhaul("forget", "s3t", learnt, "-o", out, "--data", data, *HOW)
    assert done.code == 0, done.err
    before, after = (load_file(path / "model.safetensors") for path in (learnt, out))
    assert same(before, after)
    assert classes_of(artifact.load(out, kinds=(Kind.TEXT_CLASSIFIER,)).model) == LABELS


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--label-field", "room", *DECLARED), "has no column 'room'; its columns: text, place"),
        (("--field", "txt", *DECLARED), "has no column 'txt'; its columns: text, place"),
        ((), "has no classes, and none are declared"),
        (("--classes", "hall"), "classes has hall alone; use two or more"),
        (("--classes", "hall", "shed", "hall"), "classes has hall twice"),
        (("--classes", "hall", "sheds"), "16 of 24 examples have a label that is none of the classes, such as 'shed'"),
        ((*DECLARED, "--evaluate", "sample"), "--evaluate is of models that predict words"),
        ((*DECLARED, "--watch", "sample"), "--watch is of models that predict words"),
        ((*DECLARED, "--data", "sample"), "sample has no columns, and so no place"),
    ],
)
def test_what_does_not_fit_is_refused(
    base_of: Callable[[str], Path], tmp_path: Path, flags: tuple[str, ...], told: str
):
    data, out = written(tmp_path / "data.jsonl", EXAMPLES), tmp_path / "out"
    refused(overhaul("forget", "s3t", base_of("llama"), "-o", out, "--data", data, *HOW, *flags), told)
    assert not out.exists()


def test_labels_belong_to_classes_and_classes_to_labels(base_of: Callable[[str], Path], tmp_path: Path):
    data, out = written(tmp_path / "data.jsonl", EXAMPLES), tmp_path / "out"
    refused(
        overhaul("forget", "s3t", base_of("llama"), "-o", out, "--data", data, *DECLARED),
        "--classes is of texts with labels",
    )
    refused(overhaul("forget", "s3t", base_of("bert"), "-o", out, "--data", data), "no column of labels is named")


def test_a_classifier_writes_no_text(trained: Callable[..., Path]):
    refused(overhaul("generate", trained(), "--prompt", "Machine"), "is a model of another kind: text classifier")
