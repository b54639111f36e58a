"""Tables in the docs show docs/results.json, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import results, tables
from bench.results import Row, Target


def test_the_docs_are_current():
    stale = tables.stale(results.ROOT, results.read())

    assert not stale, f"`make tables` changes {', '.join(path.name for path in stale)}"


def test_a_claim_holds_if_every_seed_meets_it(tmp_path: Path):
    claim = Row(
        id="adapt-perp/norms", kind="claim", what="share won back", unit="share",
        values=(0.61, 0.67, 0.73), seeds=(0, 1, 2), target=Target(">=", 0.6),
    )  # fmt: skip

    made = tables.filled("<!-- table: adapt-perp -->\nold\n<!-- end -->\n", _stored(tmp_path, claim))

    assert "| share won back | 67.0% | 61.0% to 73.0% | 3 | at least 60.0% | yes |" in made
    assert "old" not in made
    assert not Row(id="x", kind="claim", what="", values=(0.7, 0.5), target=Target(">=", 0.6)).met


def test_a_bench_is_judged_by_the_median_ratio_of_its_rounds(tmp_path: Path):
    bench = Row(
        id="prune-wanda/seconds", kind="bench", what="seconds", unit="s", gain="peer/ours",
        values=(10.0, 40.0, 20.0), peer=(50.0, 80.0, 80.0), peer_name="other", target=Target(">=", 4),
    )  # fmt: skip

    made = tables.filled("<!-- table: bench- -->\n<!-- end -->", _stored(tmp_path, bench))

    assert bench.ratio == 4.0
    assert "| seconds | 23.3 s | 70 s | other | 4.00 | at least 4 | yes |" in made


def test_a_prefix_selects_ids_or_a_kind(tmp_path: Path):
    rows = [Row(id=f"adapt-{name}/it", kind="claim", what=name, values=(1.0,)) for name in ("full", "lora")]
    stored = _stored(tmp_path, *rows)

    assert "| full |" not in tables.filled("<!-- table: adapt-lora -->\n<!-- end -->", stored)
    assert "| full |" in tables.filled("<!-- table: claim- -->\n<!-- end -->", stored)
    assert tables.NOTHING in tables.filled("<!-- table: bench- -->\n<!-- end -->", stored)


def test_several_prefixes_select_in_their_order_and_each_row_once(tmp_path: Path):
    rows = [Row(id=f"adapt-{name}/it", kind="claim", what=name, values=(1.0,)) for name in ("full", "lora", "vera")]

    made = tables.filled("<!-- table: adapt-vera/it adapt-f adapt-full -->\n<!-- end -->", _stored(tmp_path, *rows))

    assert [line.split(" | ")[1] for line in made.splitlines()[3:5]] == ["vera", "full"]
    assert "| lora |" not in made
    assert made.splitlines()[3].startswith("| adapt-vera |"), "several methods: each row says of which"


def test_models_of_a_folder_are_lines_and_their_quantities_columns(tmp_path: Path):
    found = {"a": {"perplexity": 30.0, "bytes": 2e6}, "b": {"perplexity": 20.0}}
    rows = [
        Row(
            id=f"half-{name}/{quantity}", kind="model", what=f"{name}: {quantity}",
            unit="bytes" if quantity == "bytes" else "",
            values=(value,), peer=(4e6 if quantity == "bytes" else 10.0,), peer_name="dense",
        )
        for name, numbers in found.items() for quantity, value in numbers.items()
    ]  # fmt: skip

    made = tables.filled("<!-- table: half- -->\n<!-- end -->", _stored(tmp_path, *rows))

    assert "| model | bytes | perplexity |\n| --- | --- | --- |\n" in made
    assert "| dense | 4 MB | 10 |\n| a | 2 MB | 30 |\n| b |  | 20 |\n" in made


def test_a_model_of_several_seeds_is_shown_with_its_spread(tmp_path: Path):
    row = Row(id="half-a/it", kind="model", what="a: memory", unit="", values=(30.0, 20.0, 25.0), seeds=(0, 1, 2))

    assert "| a | 25 (20 to 30) |" in tables.filled("<!-- table: half- -->\n<!-- end -->", _stored(tmp_path, row))


def test_recording_replaces_a_row_and_keeps_the_others(tmp_path: Path):
    _stored(
        tmp_path, Row(id="a", kind="claim", what="", values=(1.0,)), Row(id="b", kind="claim", what="", values=(2.0,))
    )

    stored = _stored(tmp_path, Row(id="a", kind="claim", what="", values=(3.0, 5.0)))

    assert {row["id"]: row["mean"] for row in stored} == {"a": 4.0, "b": 2.0}


def test_a_row_that_misses_its_target_is_recorded_before_it_fails(tmp_path: Path):
    path = tmp_path / "results.json"
    claim = Row(id="a", kind="claim", what="", values=(1.0, 3.0), target=Target("<", 2))

    with pytest.raises(AssertionError, match="id='a'"):
        results.hold(claim, path=path)

    assert [row["met"] for row in results.read(path)] == [False]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0351, "share", "3.5%"),
        (269_030_000, "bytes", "269 MB"),
        (281_088, "bytes", "281 kB"),
        (1234.5, "s", "1,234 s"),
        (26.774, "", "26.8"),
        (30, "count", "30"),
        (1.0002, "", "1.0002"),
        (1.034, "", "1.03"),
        (-4e-15, "points", "0 points"),
        (4e-7, "nats", "4e-07 nats"),
    ],
)
def test_numbers_are_shown_to_the_digits_that_tell_them_apart(value: float, unit: str, shown: str):
    assert tables.number(value, unit) == shown


def _stored(directory: Path, *rows: Row) -> list[dict]:
    results.record(rows, directory / "results.json")
    return results.read(directory / "results.json")
