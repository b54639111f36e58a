"""One table, four forms."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from overhaul.report.tables import (
    before_after,
    is_worse,
    json_rows,
    markdown_table,
    plain_table,
    print_before_after,
)
from overhaul.table import Row

from .examples import perplexity, three_facts


def accuracy(value: float) -> Row:
    return Row(model="m", metric="accuracy/boolq", value=value, low=value - 0.02, high=value + 0.02, count=500)


def test_the_table_holds_the_facts() -> None:
    content = before_after(three_facts())

    won_back = dict(zip(content.columns, map(str, content.rows[2]), strict=True))
    assert won_back == {
        "model": "won back",
        "perplexity": "49.10 [47.14, 51.06]",
        "non-zero (blocks)": "50.0%",
        "non-zero (all)": "60.5%",
        "parameters": "134.5 M",
        "size": "269 MB",
        "prefill tokens/s": "3,405",
        "decode tokens/s": "31.4",
        "peak memory": "2.46 GB",
        "time": "2 min 10 s",
        "trained": "1.82%",
        "optimizer state": "19.5 MB",
    }


def test_what_nobody_was_asked_for_has_no_column_and_what_one_was_asked_for_has() -> None:
    dense, pruned, _ = three_facts()
    silent = [replace(one, perplexity=None, tokens_per_second=None) for one in (dense, pruned)]

    content = before_after([replace(silent[0], decode_tokens_per_second=None), silent[1]])

    assert not {"perplexity", "prefill tokens/s"} & set(content.columns)
    assert str(content.rows[0][content.columns.index("decode tokens/s")]) == "n/a"


def test_worse_means_beyond_the_interval_of_the_reference() -> None:
    reference = perplexity("dense", 28.0)

    assert not is_worse(perplexity("m", reference.high), reference, "less")
    assert is_worse(perplexity("m", reference.high + 0.01), reference, "less")
    assert is_worse(accuracy(0.6), accuracy(0.63), "more")
    assert not is_worse(accuracy(0.7), accuracy(0.63), "more")


def test_costs_of_a_step_are_never_worse_but_slower_and_larger_are() -> None:
    dense, pruned, _ = three_facts()
    dear = replace(pruned, bytes=2 * 269_060_552, tokens_per_second=1000.0, seconds=1e6, perplexity=dense.perplexity)

    (_, row) = json_rows((replace(dense, seconds=1.0), dear))

    assert row["worse"] == ["size", "prefill tokens/s"]


def test_other_metrics_get_columns_and_an_unknown_direction_is_not_judged() -> None:
    dense, pruned, _ = three_facts()
    odd = Row(model="m", metric="novelty", value=9.0, low=9.0, high=9.0, count=1)
    facts = (
        replace(dense, metrics=(accuracy(0.63), replace(odd, value=1.0))),
        replace(pruned, metrics=(accuracy(0.51), odd)),
    )

    assert before_after(facts).columns[2:4] == ("accuracy/boolq", "novelty")
    assert json_rows(facts)[1]["worse"] == ["perplexity", "accuracy/boolq"]


def test_a_higher_loss_on_what_was_to_be_forgotten_is_no_worse() -> None:
    def losses(value: float) -> tuple[Row, ...]:
        names = ("loss on a (to forget)", "loss on b (to retain)")
        return tuple(Row(model="m", metric=name, value=value, low=value, high=value, count=9) for name in names)

    dense, pruned, _ = three_facts()
    told = json_rows((replace(dense, metrics=losses(1.0)), replace(pruned, metrics=losses(2.0))))

    assert told[1]["worse"] == ["perplexity", "loss on b (to retain)"]


def test_no_column_for_training_where_nothing_was_trained() -> None:
    assert {"trained", "optimizer state"}.isdisjoint(before_after(three_facts()[:2]).columns)


def test_plain_text_is_aligned_and_marks_what_got_worse() -> None:
    lines = plain_table(three_facts()).splitlines()

    assert lines[1].split(maxsplit=1)[0] == "perplexity"
    assert "1197 [1149, 1245]*" in lines[1]
    assert lines[-1] == "* worse than dense"
    # A column for the asterisk keeps every line that ends in a digit or a unit one short of the marked one.
    assert {len(line) for line in lines[2:-1]} == {len(lines[1]) - 1}


def test_up_to_four_models_stand_side_by_side_and_more_below_each_other() -> None:
    dense, *_ = three_facts()

    side_by_side = plain_table([replace(dense, label=f"model-{i}") for i in range(4)])
    below = plain_table([replace(dense, label=f"model-{i}") for i in range(5)])

    assert side_by_side.splitlines()[0].split() == ["model", "model-0", "model-1", "model-2", "model-3"]
    assert [line.split()[0] for line in below.splitlines()] == ["model", *(f"model-{i}" for i in range(5))]


def test_a_console_that_is_no_terminal_gets_the_plain_text() -> None:
    file = io.StringIO()

    print_before_after(three_facts(), Console(file=file, width=20))

    assert file.getvalue() == plain_table(three_facts())


@pytest.mark.parametrize("width", [80, 120])
def test_three_models_fit_a_terminal_uncut(width: int) -> None:
    file = io.StringIO()

    print_before_after(three_facts(), Console(file=file, width=width, force_terminal=True, color_system=None))

    assert "[47.14, 51.06]" in file.getvalue()
    assert "…" not in file.getvalue()


def test_markdown_escapes_bars() -> None:
    dense, *_ = three_facts()

    table = markdown_table([replace(dense, label="a|b")])

    assert r"| a\|b | 28.05 [26.93, 29.17] |" in table
    assert len(table.splitlines()) == 3


def test_json_rows_are_plain_and_complete() -> None:
    rows = json.loads(json.dumps(json_rows(three_facts())))

    assert rows[2]["nonzero_share_blocks"] == 0.5
    assert rows[2]["perplexity"]["value"] == 49.1
    assert rows[0]["seconds"] is None
    assert "layers" not in rows[1]


def test_a_comparison_says_on_which_fronts_a_model_is_and_not_what_its_last_step_cost() -> None:
    content = before_after(three_facts(), is_comparison=True)

    assert content.columns[-1] == "on the front"
    assert [str(row[-1]) for row in content.rows] == ["size, prefill, decode", "-", "decode"]
    assert {"peak memory", "time", "trained"}.isdisjoint(content.columns)


def test_json_tells_the_front_of_size_from_the_others() -> None:
    rows = json_rows(three_facts())

    assert [row["pareto"] for row in rows] == [True, False, False]
    assert rows[2]["fronts"] == ["decode"]


def test_perplexities_over_other_tokens_are_not_judged_and_bits_per_byte_are() -> None:
    def bits(value: float) -> tuple[Row, ...]:
        return (Row(model="m", metric="bits per byte", value=value, low=value - 0.1, high=value + 0.1, count=9),)

    dense, pruned, _ = three_facts()
    facts = (replace(dense, tokenizer="a", metrics=bits(1.0)), replace(pruned, tokenizer="b", metrics=bits(1.3)))

    assert json_rows(facts)[1]["worse"] == ["bits per byte"]
    assert json_rows((facts[0], replace(facts[1], tokenizer="a")))[1]["worse"] == ["perplexity", "bits per byte"]
