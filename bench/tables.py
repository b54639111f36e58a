"""Tables of measured numbers in README.md and docs/, written between markers from docs/results.json.

    <!-- table: PREFIX ... -->
    <!-- end -->

Each PREFIX selects rows whose id begins with it, such as `adapt-perp`; `bench-` or `claim-` in front selects one kind.
Those of the first stand first. Where they are of several methods, the first column says of which.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results

Stored = dict[str, Any]

_MARKED = re.compile(r"(<!-- table: (\S[^\n]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
ROUNDING = 1e-12
"""Sums of floats that should be 0 are up to this far from it."""
NOTHING = "*Not measured yet.*\n"


def documents(root: Path) -> list[Path]:
    """The pages that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def filled(text: str, rows: Sequence[Stored]) -> str:
    """`text` with every marked table made anew."""
    return _MARKED.sub(lambda found: found[1] + _tables(_selected(rows, found[2].split())) + found[4], text)


def _selected(rows: Sequence[Stored], prefixes: Sequence[str]) -> list[Stored]:
    def named(row: Stored, prefix: str) -> bool:
        return row["id"].startswith(prefix) or f"{row['kind']}-{row['id']}".startswith(prefix)

    found = {row["id"]: row for prefix in prefixes for row in rows if named(row, prefix)}
    return list(found.values())


def _tables(rows: Sequence[Stored]) -> str:
    models = [row for row in rows if row["kind"] == "model"]
    heads = {
        "claim": (("what", "measured", "lowest to highest", "seeds", "target", "met"), _claim),
        "bench": (("what", "overhaul", "peer", "", "ratio", "target", "met"), _bench),
    }
    of_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in heads}
    made = [_of_methods(head, of_kind[kind], cells) for kind, (head, cells) in heads.items() if of_kind[kind]]
    if models:
        made.append(_models(models))
    if not made:
        return NOTHING
    return "\n".join([*made, _where(rows)])


def _of_methods(head: Sequence[str], rows: Sequence[Stored], cells: Any) -> str:
    """A table of statements, each with its method if there are several."""
    if len({_method(row) for row in rows}) > 1:
        return _table(("", *head), rows, lambda row: (_method(row), *cells(row)))
    return _table(head, rows, cells)


def _method(row: Stored) -> str:
    return row["id"].partition("/")[0]


def _table(head: Sequence[str], rows: Sequence[Any], cells: Any) -> str:
    lines = [head, ["---"] * len(head), *(cells(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _claim(row: Stored) -> Sequence[str]:
    low, high = (number(pick(row["values"]), row["unit"]) for pick in (min, max))
    return (
        row["what"],
        number(row["mean"], row["unit"]),
        low if low == high else f"{low} to {high}",
        str(len(row["seeds"]) or 1),
        _target(row, row["unit"]),
        _met(row),
    )


def _bench(row: Stored) -> Sequence[str]:
    ours, peer = number(row["mean"], row["unit"]), ""
    if row["peer"]:
        peer = number(sum(row["peer"]) / len(row["peer"]), row["unit"])
    ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else ""
    return row["what"], ours, peer, row["peer_name"], ratio, _target(row, "" if ratio else row["unit"]), _met(row)


def _models(rows: Sequence[Stored]) -> str:
    """A line for every model, its quantities side by side; the one they began with comes first."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        name, _, quantity = row["what"].rpartition(": ")
        reference = [(row["peer_name"], row["peer"])] if row["peer"] else []
        for model, numbers in (*reference, (name, row["values"])):
            lines.setdefault(model, {})[quantity] = _with_spread(numbers, row["unit"])
    quantities = sorted({quantity for line in lines.values() for quantity in line})
    return _table(
        ("model", *quantities),
        list(lines.items()),
        lambda line: (line[0], *(line[1].get(quantity, "") for quantity in quantities)),
    )


def _with_spread(values: Sequence[float], unit: str) -> str:
    """The mean, and behind it from where to where it goes, where that is to be seen."""
    mean, low, high = (number(pick(values), unit) for pick in (statistics.fmean, min, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def _target(row: Stored, unit: str) -> str:
    if row["target"] is None:
        return ""
    sign, value = row["target"].split()
    shown = {"<=": "at most ", ">=": "at least ", "<": "under ", ">": "over ", "==": ""}[sign]
    return shown + number(float(value), unit)


def _met(row: Stored) -> str:
    return {None: "", True: "yes", False: "**no**"}[row["met"]]


def number(value: float, unit: str) -> str:
    """Three significant digits with the unit, more close to one; shares in percent, counts whole."""
    if abs(value) < ROUNDING:
        value = 0.0
    match unit:
        case "share":
            return f"{value:.1%}"
        case "bytes":
            return f"{value / 1e6:,.0f} MB" if value >= 1e6 else f"{value / 1e3:,.0f} kB"
        case "count":
            return f"{value:,.0f}"
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{5 if abs(value - 1) < 0.01 else 3}g}"
    return f"{digits} {unit}".strip()


def _where(rows: Sequence[Stored]) -> str:
    """Where and when; tables of several runs name each once."""
    places = dict.fromkeys(
        f"{row['machine']['hardware']}, torch {row['machine']['torch']}, {row['date']}, commit {row['commit']}"
        for row in rows
    )
    return f"*Measured on {'; '.join(places)}.*\n"


def stale(root: Path, rows: Sequence[Stored]) -> dict[Path, str]:
    """The pages whose tables do not show the results, with what they should be."""
    pages = {page: page.read_text() for page in documents(root) if page.is_file()}
    return {page: new for page, text in pages.items() if (new := filled(text, rows)) != text}


def main() -> None:
    """Rewrites the pages that are not current."""
    for page, text in stale(results.ROOT, results.read()).items():
        page.write_text(text)
        print(page.relative_to(results.ROOT))


if __name__ == "__main__":
    main()
