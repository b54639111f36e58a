from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from command import Finished, contents, overhaul, refused
from overhaul import artifact, execute
from overhaul.errors import Diverged, Interrupted, UserError
from overhaul.recipe import Step
from overhaul.score import Score
from overhaul.sweep import FILE, PAGE, Swept, Tried, grid, lines
from overhaul.table import Row

FIELDS = ("steps.1.lr=1e-3,0.01", "steps.full.warmup=0")


def row(metric: str, value: float) -> Row:
    return Row(model="m", metric=metric, value=value, low=value, high=value, count=1)


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe of one step for a model that is another one than the surrogate."""
    for name in ("new", "old"):
        lines = (json.dumps({"text": f"The {name} text, part {number} of {number % 7}. " * 8}) for number in range(99))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {model}\nout: {folder / 'large'}\n"
        f"data: {folder / 'new.jsonl'}\nwatch: [{folder / 'old.jsonl'}]\n"
        "evaluate_windows: 2\nevaluate_seq_len: 32\ndtype: fp32\n"
        "steps:\n  - {verb: adapt, method: full, steps: 2, batch_size: 1, seq_len: 32, lr: 0.001}\n"
    )
    return path


@pytest.fixture
def recipe(make_tiny, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, make_tiny(tie=False))


@pytest.fixture(scope="module")
def made(make_tiny, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """A recipe, the directory of a sweep, and what it told."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe, out = write_recipe(folder, make_tiny(tie=False)), folder / "out"
    return recipe, out, swept(overhaul("sweep", recipe, *FIELDS, "--model", tiny, "-o", out, "--json"))


def swept(done: Finished) -> dict:
    assert done.code == 0, done.err
    return json.loads(done.out)


# The grid, and the ranking.


def test_the_grid_has_every_combination_and_values_as_a_recipe_reads_them():
    found = grid(["steps.1.lr=1e-3,0.01", "steps.1.pattern=2:4,none"])

    assert [one.number for one in found] == [1, 2, 3, 4]
    assert [tuple(one.values.values()) for one in found] == [
        (0.001, "2:4"),
        (0.001, "none"),
        (0.01, "2:4"),
        (0.01, "none"),
    ]
    assert found[0].overrides == ("steps.1.lr=1e-3", "steps.1.pattern=2:4")


def test_a_list_in_brackets_is_one_value():
    assert [one.values["watch"] for one in grid(["watch=[a,b],[c]"])] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([], "needs a field"),
        (["steps.1.lr"], "has no values"),
        (["steps.1.lr="], "has no values"),
        (["steps.1.lr=1,,2"], "an empty one"),
        (["steps.1.lr=1e-3,0.001"], "a value twice"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["model=a,b"], "--model MODEL"),
        (["out=a,b"], "-o OUT"),
        (["resume=true"], "--resume"),
    ],
)
def test_fields_that_make_no_grid(fields: list[str], says: str):
    with pytest.raises(UserError, match=says):
        grid(fields)


def test_the_least_score_is_first_and_what_has_none_is_last():
    settings = grid(["seed=0,1,2,3"])
    values = [5.0, math.inf, 3.0]
    tried = [Tried(s, "p", {"perplexity": row("perplexity", v)}) for s, v in zip(settings, values, strict=False)]

    found = Swept(
        asked={"recipe": "r.yaml"},
        by=Score.of("perplexity"),
        tried=(*tried, Tried(settings[3], reason="it was refused")),
        before={},
    )

    assert [(score, one.setting.number) for score, one in found.ranked] == [(3.0, 3), (5.0, 1)]
    assert [one.setting.number for _, one in found.failed] == [2, 4]
    assert found.failed[1][0] == "it was refused"
    assert found.command == "overhaul run r.yaml seed=2"


def test_settings_measured_on_other_tokens_are_told_and_none_of_them_is_best():
    first, second = (
        Tried(setting, "p", {"perplexity": row("perplexity", setting.number)}, {"perplexity": judged})
        for setting, judged in zip(grid(["seed=1,2"]), "ab", strict=True)
    )

    def among(*tried: Tried) -> Swept:
        before = {"perplexity": row("perplexity", 9)}
        return Swept(asked={"recipe": "r"}, by=Score.of("perplexity"), tried=tried, before=before)

    assert "not measured on the same tokens" in among(first, second).notes[0]
    assert among(first, second).command == ""
    assert not any(line.startswith("before") for line in lines(among(first, second)))
    assert among(first, first).notes == ()
    assert among(first, first).command == "overhaul run r seed=1"
    assert any(line.startswith("before") for line in lines(among(first, first)))


# The command.


def test_each_setting_is_the_run_of_its_recipe_on_the_surrogate(
    made: tuple[Path, Path, dict], tiny: Path, tmp_path: Path
):
    recipe, out, found = made
    run = (f"model={tiny}", f"out={tmp_path / 'alone'}", "steps.1.lr=0.01", "steps.full.warmup=0")
    assert overhaul("run", recipe, *run).code == 0

    alone = tmp_path / "alone" / "01-adapt-full"
    same = [(folder / "model.safetensors").read_bytes() for folder in (out / "02" / "01-adapt-full", alone)]
    assert same[0] == same[1]
    facts = artifact.read_record(alone)["facts"]
    metrics = found["runs"][1]["metrics"]
    assert metrics["perplexity"]["value"] == facts[-1]["perplexity"]["value"]
    assert metrics["loss on old.jsonl"]["value"] == facts[-1]["metrics"][0]["value"]
    assert found["before"]["perplexity"]["value"] == facts[0]["perplexity"]["value"]


def test_what_all_began_with_is_the_surrogate_and_not_what_it_was_made_from(
    made: tuple[Path, Path, dict], recipe: Path, tmp_path: Path
):
    surrogate = made[1] / "02" / "01-adapt-full"

    found = swept(overhaul("sweep", recipe, "seed=0", "--model", surrogate, "-o", tmp_path / "out", "--json"))

    facts = artifact.read_record(tmp_path / "out" / "01" / "01-adapt-full")["facts"]
    assert len(facts) == 3
    assert found["before"]["perplexity"]["value"] == facts[1]["perplexity"]["value"]
    assert found["before"]["perplexity"]["value"] != facts[0]["perplexity"]["value"]


def test_everything_is_in_the_file_and_the_page(made: tuple[Path, Path, dict]):
    _, out, found = made

    told, page = json.loads((out / FILE).read_text()), (out / PAGE).read_text()
    assert {key: told[key] for key in found} == found
    assert [run["setting"]["values"] for run in found["runs"]] == [
        {"steps.1.lr": 0.001, "steps.full.warmup": 0},
        {"steps.1.lr": 0.01, "steps.full.warmup": 0},
    ]
    scores = [run["metrics"]["perplexity"]["value"] for run in found["runs"]]
    assert [one["score"] for one in found["ranked"]] == sorted(scores)
    assert [run["metrics"]["loss"]["value"] for run in found["runs"]] == [math.log(score) for score in scores]
    assert "01 steps.1.lr=1e-3" in page
    assert "<figure" in page


def test_it_is_ranked_again_by_what_is_asked_for_now(made: tuple[Path, Path, dict], tiny: Path):
    recipe, out, before = made
    how = ("sweep", recipe, *FIELDS, "--model", tiny, "-o", out, "--resume", "--json")

    found = swept(overhaul(*how, "--by", "0.5*perplexity + 2*loss on old.jsonl"))

    assert found["runs"] == before["runs"]
    for one in found["ranked"]:
        metrics = found["runs"][one["number"] - 1]["metrics"]
        assert one["score"] == 0.5 * metrics["perplexity"]["value"] + 2 * metrics["loss on old.jsonl"]["value"]
    swept(overhaul(*how))  # as it was


def test_the_command_at_the_end_runs_the_best_on_the_recipes_own_model(
    made: tuple[Path, Path, dict], make_tiny, tiny: Path
):
    recipe, out, found = made
    done = overhaul("sweep", recipe, *FIELDS, "--model", tiny, "-o", out, "--resume")
    assert done.code == 0, done.err

    command = done.out.splitlines()[-1].strip()
    assert overhaul(*shlex.split(command)[1:]).code == 0

    best = found["ranked"][0]["number"]
    step = artifact.read_record(recipe.parent / "large" / "01-adapt-full")["lineage"][0]
    assert step["parents"][0]["path"] == str(make_tiny(tie=False))
    assert step["fields"]["lr"] == {1: 0.001, 2: 0.01}[best]
    assert done.out.splitlines()[2].startswith(f"{best:02d} steps.1.lr=")


def test_a_setting_that_is_refused_or_diverges_is_a_row_with_its_reason(recipe: Path, tiny: Path, tmp_path: Path):
    how = ("steps.full.lr=-1,1e38,1e-3", "--model", tiny, "-o", tmp_path / "out")

    done = overhaul("sweep", recipe, *how)

    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / FILE).read_text())
    assert [one["number"] for one in found["ranked"]] == [3]
    refusal, divergence = (one["reason"] for one in found["failed"])
    assert "recipe.yaml:9: adapt full: lr = -1" in refusal
    assert "not finite at step 2" in divergence
    assert "01 steps.full.lr=-1: " in done.out


def test_a_setting_without_memory_is_a_row(recipe: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_step = execute.run_step

    def short_of_memory(step: Step, *arguments: object, **more: object) -> object:
        import torch

        if step.options.seed == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GB")
        if step.options.seed == 2:
            return torch.empty(1 << 60, dtype=torch.uint8)
        if step.options.seed == 3:
            raise MemoryError
        return run_step(step, *arguments, **more)  # pyright: ignore

    monkeypatch.setattr(execute, "run_step", short_of_memory)

    found = swept(overhaul("sweep", recipe, "seed=0,1,2,3", "--model", tiny, "-o", tmp_path / "out", "--json"))

    cuda, cpu, python = (one["reason"] for one in found["failed"])
    assert cuda.startswith("out of memory: CUDA")
    assert cpu.startswith("out of memory: ")
    assert python == "out of memory: Python's"
    assert [one["number"] for one in found["ranked"]] == [1]


def test_finished_settings_are_kept_and_others_tried_again(
    recipe: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_step, ran = execute.run_step, []

    def stopping(step: Step, *arguments: object, **more: object) -> object:
        ran.append(step.options.seed)
        if step.options.seed == 1:
            raise Diverged("not today")
        if step.options.seed == 2:
            raise Interrupted("stopped")
        return run_step(step, *arguments, **more)  # pyright: ignore

    how = ("sweep", recipe, "seed=0,1,2", "--model", tiny, "-o", tmp_path / "out")
    monkeypatch.setattr(execute, "run_step", stopping)
    assert overhaul(*how).code == 130
    assert json.loads((tmp_path / "out" / FILE).read_text())["ranked"][0]["number"] == 1
    monkeypatch.setattr(execute, "run_step", lambda *a, **k: (ran.append(a[0].options.seed), run_step(*a, **k))[1])
    before = contents(tmp_path / "out" / "01")

    found = swept(overhaul(*how, "--resume", "--json"))

    assert ran == [0, 1, 2, 1, 2]
    assert contents(tmp_path / "out" / "01") == before
    assert sorted(one["number"] for one in found["ranked"]) == [1, 2, 3]
    assert found["failed"] == []


def test_a_dry_run_says_the_settings_and_writes_nothing(recipe: Path, tiny: Path, tmp_path: Path):
    done = overhaul("sweep", recipe, "steps.1.batch_size=1,0", "--model", tiny, "-o", tmp_path / "out", "--dry-run")

    assert done.code == 0, done.err
    assert "2 settings on" in done.err
    assert "02 steps.1.batch_size=0   refused: " in done.err
    assert "adapt full on" in done.err
    assert not (tmp_path / "out").exists()


# Mistakes.


def test_a_field_that_no_step_has(recipe: Path, tiny: Path, tmp_path: Path):
    run = ("--model", tiny, "-o", tmp_path / "out")

    refused(overhaul("sweep", recipe, "steps.full.learn=1,2", *run), "has no field 'learn'")
    refused(overhaul("sweep", recipe, "steps.full.warmpu=0,1", *run), "did you mean 'warmup'")
    refused(overhaul("sweep", recipe, "steps.lora.rank=1,2", *run), "names nothing")
    refused(overhaul("sweep", recipe, "steps.full.lr=-1,-2", *run), "greater than 0")
    refused(overhaul("sweep", recipe, "steps.full.lr=1,2", "steps.1.learning_rate=3,4", *run), "are one field")
    assert not (tmp_path / "out").exists()


def test_what_no_step_measures(recipe: Path, tiny: Path, tmp_path: Path):
    run = ("--model", tiny, "-o", tmp_path / "out")

    refused(
        overhaul("sweep", recipe, "seed=0,1", *run, "--by", "loss on sample"),
        "no last step measures 'loss on sample'", "perplexity, loss, loss on old.jsonl",
    )  # fmt: skip
    refused(overhaul("sweep", recipe, "seed=0,1", "evaluate=none", *run), "no last step measures 'perplexity'")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(recipe: Path, tiny: Path, tmp_path: Path):
    out = shutil.copytree(tiny, tmp_path / "out")
    before = contents(out)

    refused(overhaul("sweep", recipe, "seed=0,1", "--model", tiny, "-o", out), "is not empty")
    refused(overhaul("sweep", recipe, "seed=0,1", "--model", tiny, "-o", out, "--dry-run"), "is not empty")

    assert contents(out) == before


def test_a_directory_without_a_sweep_is_not_resumed(recipe: Path, tiny: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / PAGE).write_text("mine")

    refused(overhaul("sweep", recipe, "seed=0", "--model", tiny, "-o", out, "--resume"), "is not empty")

    assert [(file.name, file.read_text()) for file in out.iterdir()] == [(PAGE, "mine")]


def test_a_sweep_that_was_stopped_in_its_first_setting_is_one_to_be_resumed(
    recipe: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopping(*_: object, **__: object) -> object:
        raise Interrupted("stopped")

    how = ("sweep", recipe, "seed=0", "--model", tiny, "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(execute, "run_step", stopping)
        assert overhaul(*how).code == 130
    assert json.loads((tmp_path / "out" / FILE).read_text())["failed"] == [{"number": 1, "reason": "not yet run"}]

    assert swept(overhaul(*how, "--resume", "--json"))["failed"] == []


def test_a_sweep_inside_the_model_is_refused(recipe: Path, tiny: Path):
    refused(overhaul("sweep", recipe, "seed=0", "--model", tiny, "-o", tiny / "out"), "inside the model")
    assert not (tiny / "out").exists()


def test_another_sweep_is_not_resumed(recipe: Path, tiny: Path, tmp_path: Path):
    run = ("--model", tiny, "-o", tmp_path / "out")
    assert overhaul("sweep", recipe, "seed=0", *run).code == 0

    refused(overhaul("sweep", recipe, "seed=0,1", *run, "--resume"), "holds another sweep: its fields is")
    recipe.write_text(recipe.read_text() + "# changed\n")
    refused(overhaul("sweep", recipe, "seed=0", *run, "--resume"), "its recipe_sha256")


def test_a_sweep_is_resumed_with_its_recipe_elsewhere_but_not_with_other_weights(
    recipe: Path, tiny: Path, tmp_path: Path
):
    model = shutil.copytree(tiny, tmp_path / "model")
    run = ("seed=0", "--model", model, "-o", tmp_path / "out")
    assert overhaul("sweep", recipe, *run).code == 0

    moved = recipe.rename(tmp_path / "moved.yaml")
    assert overhaul("sweep", moved, *run, "--resume").code == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})

    refused(overhaul("sweep", moved, *run, "--resume"), "holds another sweep: its model_sha256")


def test_a_damaged_file_is_not_resumed(recipe: Path, tiny: Path, tmp_path: Path):
    run = ("sweep", recipe, "seed=0", "--model", tiny, "-o", tmp_path / "out")
    assert overhaul(*run).code == 0
    file = tmp_path / "out" / FILE
    whole = file.read_text()

    for damaged in (whole[:-50], "[]", whole.replace('"metrics"', '"metric"'), whole.replace('"low"', '"lower"')):
        file.write_text(damaged)
        refused(overhaul(*run, "--resume"), f"{file} is damaged")
        assert file.read_text() == damaged


def test_a_model_or_a_recipe_that_is_not_there(recipe: Path, tiny: Path, tmp_path: Path):
    refused(
        overhaul("sweep", recipe, "seed=0", "--model", tmp_path / "no", "-o", tmp_path / "out"), str(tmp_path / "no")
    )
    refused(overhaul("sweep", tmp_path / "no.yaml", "seed=0", "-o", tmp_path / "out"), "no recipe at")
    assert not (tmp_path / "out").exists()


def test_nothing_that_could_be_ranked_ends_as_a_mistake(recipe: Path, tiny: Path, tmp_path: Path):
    done = overhaul("sweep", recipe, "steps.full.lr=1e38", "--model", tiny, "-o", tmp_path / "out")

    assert done.code == 2
    assert "none of the 1 settings has a score" in done.told
    assert "not finite" in done.out
