"""Tasks with checkable answers, as a stand-in for data that nobody else may see: prompt and completion in JSON lines.

python -m bench.checkable boolean 600 private.jsonl
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

Example = tuple[str, str]


def boolean(draw: random.Random) -> Example:
    """An expression of `and`, `or`, `not` and brackets, as in BIG-bench's boolean expressions."""
    expression = _expression(draw, depth=3)
    return f"{expression} =", f" {eval(expression, {'__builtins__': {}})}"


def _expression(draw: random.Random, depth: int) -> str:
    kind = draw.random()
    if depth == 0 or kind < 0.15:
        return draw.choice(["True", "False"])
    if kind < 0.4:
        return f"not {_expression(draw, depth - 1)}"
    left, word, right = _expression(draw, depth - 1), draw.choice(["and", "or"]), _expression(draw, depth - 1)
    return f"( {left} {word} {right} )" if kind < 0.6 else f"{left} {word} {right}"


def sorting(draw: random.Random) -> Example:
    """Three to five small numbers, to be put in order."""
    numbers = [draw.randrange(1, 100) for _ in range(draw.randrange(3, 6))]
    return f"sort {' '.join(map(str, numbers))} :", f" {' '.join(map(str, sorted(numbers)))}"


UNITS = {("hours", "minutes"): 60, ("weeks", "days"): 7, ("feet", "inches"): 12, ("days", "hours"): 24}


def units(draw: random.Random) -> Example:
    """A length of time or space in a smaller unit."""
    (large, small), factor = draw.choice(list(UNITS.items()))
    count = draw.randrange(2, 60)
    return f"{count} {large} in {small} :", f" {count * factor} {small}"


TASKS: dict[str, Callable[[random.Random], Example]] = {"boolean": boolean, "sorting": sorting, "units": units}


def answer(task: str, prompt: str) -> str | None:
    """The right answer to a prompt that somebody else wrote, bare of spaces; None where it is none of the task."""
    words = re.findall(r"[()]|[^\s()]+", prompt)
    try:
        if (
            task == "boolean"
            and words[-1] == "="
            and set(words[:-1]) <= {"True", "False", "and", "or", "not", "(", ")"}
        ):
            return f"{eval(' '.join(words[:-1]), {'__builtins__': {}})}"
        if task == "sorting" and (words[0], words[-1]) == ("sort", ":"):
            return f"{' '.join(map(str, sorted(map(int, words[1:-1]))))}"
        if task == "units" and (words[2], words[4:]) == ("in", [":"]):
            return f"{int(words[0]) * UNITS[words[1], words[3]]} {words[3]}"
    except (SyntaxError, ValueError, KeyError, IndexError, TypeError):
        return None
    return None


def examples(task: str, count: int, seed: int, *, without: frozenset[str] = frozenset()) -> list[Example]:
    """So many examples with different prompts, none of which is one of `without`."""
    draw, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        prompt, completion = TASKS[task](draw)
        if prompt not in without:
            found[prompt] = completion
    return list(found.items())


def write(path: Path, rows: list[Example]) -> Path:
    """A file of prompts and completions."""
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


if __name__ == "__main__":
    write(Path(sys.argv[3]), examples(sys.argv[1], int(sys.argv[2]), seed=0))
