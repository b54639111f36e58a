"""Charts say what they show, and their numbers can be had."""

import csv
import io
import re
from urllib.parse import unquote

from overhaul.report.findings import curve_figure, curve_figures, layer_figures, map_figures
from overhaul.table import Curve, LayerMap

from .examples import full_report


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


def test_a_curve_with_a_title_of_its_own_keeps_it_and_each_is_said_once() -> None:
    one, other = (
        Curve(name=name, x=(0.0, 1.0), y=(1.0, 2.0), x_label="block", y_label="outliers", title="Half are outliers")
        for name in "ab"
    )

    (figure,) = curve_figures([one, other])

    assert figure.title == "Half are outliers"
    assert figure.header == ("block", "a", "b")


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
