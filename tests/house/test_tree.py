"""The habits that a machine can check: size, documentation, types, and who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import overhaul
from command import python
from overhaul import catalog

SOURCE = Path(overhaul.__file__).parent
TESTS = Path(__file__).parents[1]
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 500, 80
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "base", "common", "misc"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def definitions(node: ast.AST, *, public: bool = False, at: str = "") -> Iterator[tuple[str, Definition]]:
    """Functions and classes of a module and its classes, with their dotted names; not those inside functions."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, Definition) and not (public and inner.name.startswith("_")):
            yield f"{at}{inner.name}", inner
            if isinstance(inner, ast.ClassDef):
                yield from definitions(inner, public=public, at=f"{at}{inner.name}.")


def inherited(tree: ast.Module) -> set[str]:
    """Dotted names of methods of classes with bases: their documentation is where they are declared."""
    return {
        f"{name}.{inner.name}"
        for name, node in definitions(tree)
        if isinstance(node, ast.ClassDef) and node.bases
        for inner in node.body
        if isinstance(inner, Function)
    }


@pytest.fixture(params=FILES, ids=name_of)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def test_files_are_short_and_named_for_what_they_hold(file: Path):
    assert len(file.read_text("utf-8").splitlines()) <= LONGEST_FILE
    assert file.stem not in FORBIDDEN_NAMES


def test_functions_are_short(tree: ast.Module):
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]

    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno is not None}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION} == {}


def test_every_module_and_public_name_is_documented(tree: ast.Module):
    overriding = inherited(tree)

    assert ast.get_docstring(tree)
    missing = [
        name for name, node in definitions(tree, public=True) if not ast.get_docstring(node) and name not in overriding
    ]
    assert missing == []


def test_every_public_function_is_annotated(tree: ast.Module):
    missing = []
    for name, node in definitions(tree, public=True):
        if isinstance(node, Function):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [arg.arg for arg in given if arg.annotation is None and arg.arg not in ("self", "cls")]
            missing += [f"{name}({arg})" for arg in bare] + ([f"{name} -> ?"] if node.returns is None else [])
    assert missing == []


def test_nothing_is_left_to_do(file: Path):
    text = file.read_text("utf-8")

    assert not [word for word in ("TODO", "FIXME", "XXX") if word in text]


def imported(tree: ast.Module, *, everywhere: bool) -> set[str]:
    """Modules that are imported: at the top, or inside functions too; what only the type checker sees is left out."""
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.Import):
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
            if everywhere or not isinstance(node, Function):
                pending.append(node)
    return found


@pytest.mark.parametrize("verb", [verb for verb in catalog.VERBS if verb != "measure"])
def test_no_method_imports_another_verbs_package(verb: str):
    """But a measure may train: it stands above the verbs that change models."""
    others = [f"overhaul.{other}." for other in catalog.VERBS if other != verb]

    for file in (SOURCE / verb).glob("*.py"):
        names = imported(ast.parse(file.read_text("utf-8")), everywhere=True)
        assert [name for name in names if f"{name}.".startswith(tuple(others))] == [], file.name


@pytest.mark.parametrize("verb", catalog.VERBS)
def test_methods_import_heavy_packages_inside_functions(verb: str):
    for file in (SOURCE / verb).glob("*.py"):
        names = imported(ast.parse(file.read_text("utf-8")), everywhere=False)
        assert not {"torch", "transformers", "numpy", "peft", "accelerate"} & {n.split(".")[0] for n in names}, (
            file.name
        )


def test_importing_the_package_and_every_method_does_not_import_torch():
    code = "import sys, overhaul\nfrom overhaul import catalog\n"
    code += "for entry in catalog.ENTRIES:\n entry.load()\n"
    code += "print(*sorted({'torch', 'transformers', 'numpy', 'accelerate', 'peft'} & set(sys.modules)))"
    done = python(code)

    assert done.code == 0, done.err
    assert done.out.strip() == ""


def test_unit_tests_stand_where_the_source_stands():
    """The test of a file has its name and its place; the test of docs/ is that of a folder."""
    for test in (TESTS / "unit").rglob("test_*.py"):
        tested = test.relative_to(TESTS / "unit").with_name(test.stem.removeprefix("test_"))
        bench = TESTS.parent / "bench" / tested.with_suffix(".py")
        places = (SOURCE / tested.with_suffix(".py"), SOURCE / tested, TESTS.parent / tested, bench)
        assert any(place.exists() for place in places), f"{test.name} tests nothing"
