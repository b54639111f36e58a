"""Recipes are read strictly, told about with lines, overridden by path, and written so that they can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from overhaul import recipe
from overhaul.errors import UserError, UserErrors

GOOD = """\
model: smollm2-135m
out: runs/x
data: sample
steps:
  - verb: prune
    method: wanda
    sparsity: 0.6
  - verb: adapt
    method: lora
    targets: [q_proj, v_proj]
    seed: 7
"""


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path / "r.yaml"


def told(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The mistakes of a recipe, without the directory."""
    with pytest.raises(UserErrors) as caught:
        recipe.read(write(tmp_path, text), overrides)
    return [str(error).replace(f"{tmp_path}/", "") for error in caught.value.errors]


def test_steps_have_methods_and_the_recipes_options(tmp_path: Path):
    found = recipe.read(write(tmp_path, GOOD))

    assert (found.model, found.out) == ("smollm2-135m", Path("runs/x"))
    wanda, lora = found.steps
    assert (wanda.entry.name, wanda.method.model_dump()["sparsity"]) == ("wanda", 0.6)
    assert lora.method.model_dump()["targets"] == ("q_proj", "v_proj")
    assert (wanda.options.data, lora.options.data) == ("sample", "sample")
    assert (wanda.options.seed, lora.options.seed) == (0, 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("sparsity: 0.6", "sparsity: 1.6"), "r.yaml:7: prune wanda: sparsity = 1.6: input should be less than 1"),
        (("sparsity: 0.6", "sparsty: 0.6"), "r.yaml:7: prune wanda has no field 'sparsty'"),
        (("method: wanda", "method: wnada"), "r.yaml:6: prune has no method 'wnada'"),
        (("verb: adapt", "verb: adpat"), "r.yaml:8: unknown verb 'adpat'"),
        (("data: sample", "dta: sample"), "r.yaml:3: unknown key 'dta'"),
        (("data: sample", "seed: x"), "r.yaml:3: the recipe: seed = 'x'"),
        (("model: smollm2-135m", ""), "'model' is missing"),
        (("    seed: 7", "    targets: q_proj\n"), "r.yaml:11: adapt lora: targets = 'q_proj'"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, change: tuple[str, str], said: str):
    [mistake] = told(tmp_path, GOOD.replace(*change))

    assert said in mistake


def test_all_mistakes_are_told_at_once(tmp_path: Path):
    text = GOOD.replace("0.6", "6").replace("lora", "loar").replace("data", "dat")

    assert [mistake.split(":")[1] for mistake in told(tmp_path, text)] == ["3", "7", "9"]


def test_names_of_other_tools_are_understood():
    step = {"verb": "adapt", "method": "full", "max_steps": 9, "learning_rate": 1e-3, "max_grad_norm": 2}

    method = recipe.parse({"model": "m", "out": "o", "steps": [step]}).steps[0].method

    assert {**method.model_dump()} == {**method.model_dump(), "steps": 9, "lr": 1e-3, "clip": 2.0}


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("out=elsewhere", lambda r: r.out, Path("elsewhere")),
        ("seed=3", lambda r: r.steps[0].options.seed, 3),
        ("steps.1.sparsity=0.25", lambda r: r.steps[0].method.sparsity, 0.25),
        ("steps.wanda.pattern=2:4", lambda r: r.steps[0].method.pattern, "2:4"),
        ("steps.lora.targets=[k_proj]", lambda r: r.steps[1].method.targets, ("k_proj",)),
        ("evaluate=none", lambda r: r.steps[1].options.evaluate, "none"),
    ],
)
def test_overrides(tmp_path: Path, override: str, get: Any, expected: object):
    text = GOOD.replace("    sparsity: 0.6\n", "") if "pattern" in override else GOOD

    assert get(recipe.read(write(tmp_path, text), [override])) == expected


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps.1.sparsity", "is not path.to.field=value"),
        ("steps.9.sparsity=0.5", "names nothing"),
        ("steps.perp.lr=1", "names nothing"),
        ("steps.lora.rnk=4", "did you mean 'rank'?"),
        ("steps.lora.rank=-4", "rank = -4"),
        ("steps.lora.targets=[", "not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_applied(tmp_path: Path, override: str, said: str):
    assert said in told(tmp_path, GOOD, override)[0]


def test_a_date_is_text():
    assert recipe.value("2024-01-31") == "2024-01-31"
    assert recipe.value("[2024-01-31 10:00:00, 1]") == ["2024-01-31 10:00:00", 1]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3, 0.01", ["1e-3", "0.01"]),
        ("a,,b", ["a", "", "b"]),
        ("[a,b],[[c,d],e],none", ["[a,b]", "[[c,d],e]", "none"]),
        ("{a: 1, b: [2,3]},{a: 2}", ["{a: 1, b: [2,3]}", "{a: 2}"]),
        ("'a,b',\"c,]d\"", ["'a,b'", '"c,]d"']),
        ("'it''s, [',b", ["'it''s, ['", "b"]),
        ('"a\\",b",c', ['"a\\",b"', "c"]),
        ("it's,that's", ["it's", "that's"]),
        ("a],b", ["a]", "b"]),
    ],
)
def test_values_stand_between_commas_outside_of_brackets_and_quotes(text: str, values: list[str]):
    assert recipe.values(text) == values


def test_a_field_has_one_name(tmp_path: Path):
    plan = recipe.read(write(tmp_path, GOOD))

    assert recipe.field_called(plan, "steps.lora.learning_rate") == "steps.2.lr"
    assert recipe.field_called(plan, "steps.2.lr") == "steps.2.lr"
    assert recipe.field_called(plan, "seed") == "seed"


def test_plain_values_mean_what_they_look_like(tmp_path: Path):
    """YAML 1.1 takes 1e-3, without a point, for text, and 2:4 for 124, in base 60."""
    text = GOOD.replace("seed: 7", "lr: 1e-3").replace("sparsity: 0.6", "pattern: 2:4")

    wanda, lora = recipe.read(write(tmp_path, text)).steps

    assert wanda.method.model_dump()["pattern"] == "2:4"
    assert lora.method.model_dump()["lr"] == 1e-3


@pytest.mark.parametrize("text", ["", "just words", "[1, 2]", "a: [", "\tx: 1"])
def test_what_is_not_a_recipe(tmp_path: Path, text: str):
    with pytest.raises(UserError, match=r"r\.yaml"):
        recipe.read(write(tmp_path, text))


def test_what_is_written_can_be_read(tmp_path: Path):
    steps = [("prune", "wanda", {"sparsity": 0.25, "data": "sample"}), ("adapt", "lora", {"targets": ("q_proj",)})]

    text = recipe.to_yaml("smollm2-135m", steps, out="again")

    found = recipe.read(write(tmp_path, text))
    assert (found.model, found.out, len(found.steps)) == ("smollm2-135m", Path("again"), 2)
    assert found.steps[1].method.model_dump()["targets"] == ("q_proj",)
    assert yaml.safe_load(text)["steps"][0] == {"verb": "prune", "method": "wanda", "sparsity": 0.25, "data": "sample"}


def test_the_schema_knows_every_method_and_every_option():
    from overhaul import catalog
    from overhaul.options import Options

    schema = recipe.schema()

    steps = schema["properties"]["steps"]["items"]["oneOf"]
    named = [(step["properties"]["verb"]["const"], step["properties"]["method"]["const"]) for step in steps]
    assert named == [(entry.verb, entry.name) for entry in catalog.ENTRIES if catalog.changes(entry)]
    assert schema["properties"].keys() >= Options.model_fields.keys() | {"model", "out", "steps"}
