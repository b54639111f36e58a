"""Charts say what they show, and their numbers can be had."""

import csv
import io
import re
from dataclasses import replace
from urllib.parse import unquote

from overhaul.report.findings import curve_figure, curve_figures, layer_figures, map_figures, trade_figures
from overhaul.table import TOKENS, Curve, LayerMap, Span

from .examples import full_report, layers, perplexity, three_facts


def test_the_csv_of_a_chart_has_all_points_exactly() -> None:
    loss = full_report().curves[0]

    figure = curve_figure([loss])

    _, encoded = figure.csv_url.split(",", 1)
    header, *rows = csv.reader(io.StringIO(unquote(encoded)))
    assert header == ["step", "loss"]
    assert [(float(x), float(y)) for x, y in rows] == list(zip(loss.x, loss.y, strict=True))
    assert len(figure.rows) <= 50


def test_the_titles_state_the_findings() -> None:
    report = full_report(num_blocks=2)

    loss, rate = (curve_figure([curve]).title for curve in report.curves[:2])
    sparsity, error = (figure.title for figure in layer_figures(report.facts))

    assert re.fullmatch(r"Loss fell from 6\.\d+ to 3\.\d+", loss)
    assert rate == "Learning rate peaked at 0.0005"
    assert sparsity == "pruned, won back: sparsity is 50.0% in every layer"
    assert error.startswith("pruned: error is highest in model.layers.1.mlp.down_proj: 0.19")


def test_the_few_zeros_of_a_model_that_was_not_pruned_are_not_drawn() -> None:
    dense, *_, won_back = three_facts()
    few = replace(dense, layers=layers(2, 0.002, None))

    assert layer_figures([few]) == []
    assert [figure.title for figure in layer_figures([few, won_back])] == [
        figure.title for figure in layer_figures([won_back])
    ]


def test_a_curve_with_a_title_of_its_own_keeps_it_and_each_is_said_once() -> None:
    one, other = (
        Curve(name=name, x=(0.0, 1.0), y=(1.0, 2.0), x_label="block", y_label="outliers", title="Half are outliers")
        for name in "ab"
    )

    (figure,) = curve_figures([one, other])

    assert figure.title == "Half are outliers"
    assert figure.header == ("block", "a", "b")


def test_the_losses_on_all_texts_are_one_figure_over_tokens_that_says_what_is_marked() -> None:
    old = Curve(name="old", x=(0, 1_234_567), y=(4.0, 4.5), x_label=TOKENS, y_label="held-out loss", title="old rises",
                spans=(Span(x=1_234_567, low=4.0, high=4.5, text="+0.500"),))  # fmt: skip
    new = replace(old, name="new", y=(3.0, 2.0), title="new falls", spans=())

    (figure,) = curve_figures([new, old])

    assert figure.title == "new falls; old rises"
    assert figure.caption.endswith("2 points. Marked: how far a line rose above its beginning.")
    assert figure.header == ("tokens trained on", "new", "old")
    assert figure.rows == (("0", "3.000", "4.000"), ("1,234,567", "2.000", "4.500"))
    assert figure.csv.splitlines()[1:] == ["0,3.0,4.0", "1234567,2.0,4.5"]
    assert "Marked" not in curve_figure([new]).caption


def test_maps_of_one_quantity_share_a_scale() -> None:
    small, large = (
        LayerMap(model=name, quantity="outliers", values=(("layers.0.up", 1.0), ("layers.0.down", most)))
        for name, most in (("small", 2.0), ("large", 4.0))
    )

    figures = map_figures([small, large])

    assert ['fill-opacity="0.250"' in figure.svg for figure in figures] == [True, True]
    assert figures[0].title == "small: outliers is highest in layers.0.down: 2.0, against 1.5 in the median layer"
    assert figures[1].rows == (("layers.0.up", "1.0"), ("layers.0.down", "4.0"))


def test_a_map_without_numbers_says_so() -> None:
    (figure,) = map_figures([LayerMap(model="m", quantity="outliers", values=(("layers.0.up", None),))])

    assert figure.title == "m: outliers was not measured"


def test_a_trade_names_the_models_that_nothing_beats_and_has_all_numbers() -> None:
    dense, pruned, won_back = three_facts()
    small = replace(won_back, label="small", bytes=100_000_000, perplexity=perplexity("m", 31.0))

    size, prefill, decode = trade_figures([dense, pruned, small])

    assert size.title == "No model is both better and smaller than dense and small"
    assert prefill.title == "No model is both better and faster in prefill than dense"
    assert decode.title == "No model is both better and faster in decoding than dense and small"
    assert ">3,410</text>" in prefill.svg
    assert "e+0" not in prefill.svg
    assert size.rows[1] == ("pruned", "1197 [1149, 1245]", "269 MB", "no")
    header, *rows = csv.reader(io.StringIO(size.csv))
    assert header == ["model", "perplexity", "low", "high", "weights on disk", "on the front"]
    assert [(row[0], float(row[1]), float(row[4]), row[5]) for row in rows] == [
        ("dense", 28.05, 269_060_552.0, "true"),
        ("pruned", 1197.3, 269_060_552.0, "false"),
        ("small", 31.0, 100_000_000.0, "true"),
    ]


def test_a_trade_of_which_only_one_model_is_known_is_not_drawn() -> None:
    dense, pruned, _ = three_facts()

    assert [figure.file_name for figure in trade_figures([dense, replace(pruned, decode_tokens_per_second=None)])] == [
        "size.csv",
        "prefill.csv",
    ]
    assert trade_figures([dense, replace(pruned, perplexity=None)]) == []
