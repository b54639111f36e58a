"""Charts: right ticks, no lost spikes, numbers where they belong."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from overhaul.report.figures import bar_chart, curves_png, drawn, heat_map, line_chart, placed, thinned, ticks
from overhaul.report.numbers import as_percent
from overhaul.table import TOKENS, Curve, Span

from .examples import full_report, layers


def curve(name: str, *ys: float) -> Curve:
    return Curve(name=name, x=tuple(range(len(ys))), y=ys, x_label="step", y_label="loss")


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(3.4, 6.9) == [4, 5, 6]
    assert ticks(0, 5.2e-4) == pytest.approx([0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4])
    assert ticks(7, 7) == [7]


def test_thinning_keeps_the_extremes_in_order() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(10_000)]
    points[5_001] = (5_001.0, 99.0)

    kept = thinned(points, most=200)

    assert len(kept) <= 200
    assert (5_001.0, 99.0) in kept
    assert kept == sorted(kept)


def test_a_short_line_is_drawn_as_it_is() -> None:
    assert thinned([(0.0, 1.0), (1.0, 2.0)]) == [(0.0, 1.0), (1.0, 2.0)]


def test_higher_values_are_drawn_higher_and_not_a_number_is_left_out() -> None:
    svg = ElementTree.fromstring(line_chart([curve("loss", 3.0, math.nan, 1.0)], title="t"))

    (line,) = svg.iter("polyline")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert x0 < x1
    assert y0 < y1  # SVG counts downwards


@pytest.mark.parametrize("high", [3e-4, 3e-5, 4.0, 123_456.0])
def test_the_numbers_beside_the_axis_fit_into_the_picture(high: float) -> None:
    svg = ElementTree.fromstring(line_chart([curve("lr", high / 10, high)], title="t"))

    beside = [text for text in svg.iter("text") if text.get("text-anchor") == "end"]
    assert beside
    assert all(float(text.attrib["x"]) >= 7 * len(text.text or "") for text in beside), "7 a character is ample"


@pytest.mark.parametrize("ys", [(2.0,), (2.0, 2.0), (0.0, 0.0), (math.nan,), ()])
def test_degenerate_curves_are_drawn(ys: tuple[float, ...]) -> None:
    svg = line_chart([curve("loss", *ys)], title="t")

    assert "nan" not in svg
    ElementTree.fromstring(svg)


def test_series_differ_by_more_than_colour_and_are_named() -> None:
    svg = line_chart([curve("ce", 2, 1), curve("distill", 1, 0.5)], title="t")

    assert "stroke-dasharray" in svg
    assert ">ce</text>" in svg
    assert ">distill</text>" in svg


def watched(*spans: Span, ys: tuple[float, ...] = (4.0, 5.0, 4.5)) -> Curve:
    return Curve(name="old", x=(0, 200, 400), y=ys, x_label=TOKENS, y_label="loss", spans=spans)


def test_a_marked_distance_goes_from_the_beginning_s_level_to_the_point() -> None:
    svg = ElementTree.fromstring(line_chart([watched(Span(x=200, low=4.0, high=5.0, text="+1.000"))], title="t"))

    (line,) = svg.iter("polyline")
    start, top, _ = ([float(number) for number in point.split(",")] for point in line.attrib["points"].split())
    level, upright = (mark.attrib for mark in svg.iter("line") if mark.attrib["class"] == "span s0")
    assert [float(level[end]) for end in ("x1", "y1", "x2", "y2")] == [*start, top[0], start[1]]
    assert [float(upright[end]) for end in ("x1", "y1", "x2", "y2")] == [top[0], start[1], *top]
    assert "+1.000" in [text.text for text in svg.iter("text")]


def test_charts_over_tokens_begin_at_zero_so_that_they_stand_below_each_other() -> None:
    rate = Curve(name="lr", x=(100, 400), y=(1.0, 2.0), x_label=TOKENS, y_label="learning rate")

    ends = []
    for one in (watched(), rate):
        (line,) = ElementTree.fromstring(line_chart([one], title="t")).iter("polyline")
        ends.append({float(point.split(",")[0]) for point in line.attrib["points"].split()})

    left, right = min(ends[0]), max(ends[0])
    assert max(ends[1]) == right
    assert min(ends[1]) == pytest.approx(left + (right - left) / 4, abs=0.1)


def test_millions_of_tokens_have_a_suffix_and_steps_have_none() -> None:
    def places(label: str) -> list[str]:
        line = Curve(name="old", x=(0, 2_000_000), y=(1.0, 2.0), x_label=label, y_label="loss")
        svg = ElementTree.fromstring(line_chart([line], title="t"))
        return [mark.text or "" for mark in svg.iter("text") if mark.attrib.get("text-anchor") == "middle"][:-1]

    assert places(TOKENS) == ["0", "500,000", "1M", "1.5M", "2M"]
    assert places("step") == ["0", "500,000", "1,000,000", "1,500,000", "2,000,000"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_names_in_a_legend_overlap(count: int) -> None:
    curves = [curve(f"boolq-passages-{number}", 2, 1) for number in range(count)]

    svg = ElementTree.fromstring(line_chart(curves, title="t"))

    names = [mark.attrib for mark in svg.iter("text") if mark.text and mark.text.startswith("boolq")]
    places = [(float(mark["y"]), float(mark["x"])) for mark in names]
    assert all(x >= 0 for _, x in places)
    rows = {y: sorted(x for other, x in places if other == y) for y, _ in places}
    assert all(right - left > 7 * 16 for xs in rows.values() for left, right in pairwise(xs))
    (line,) = {float(mark.attrib["points"].split()[0].split(",")[1]) for mark in svg.iter("polyline")}
    assert line > max(rows)  # below all of it


def test_bars_are_proportional() -> None:
    svg = ElementTree.fromstring(bar_chart([("a", 0.5), ("b", 1.0), ("c", -0.2)], title="t", full="dense"))

    half, whole, none = (float(bar.attrib["width"]) for bar in svg.iter("rect") if bar.attrib["class"] == "bar")
    assert half == pytest.approx(whole / 2, abs=0.1)
    assert none == 0


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj", ("3", "self_attn.q_proj")),
        ("h.11.mlp.experts.2.up", ("11", "mlp.experts.2.up")),
        ("lm_head", ("", "lm_head")),
    ],
)
def test_layers_are_placed_by_block_and_projection(name: str, place: tuple[str, str]) -> None:
    assert placed(name) == place


def test_a_heat_map_has_one_cell_per_layer_at_its_strength() -> None:
    values = [(layer.name, layer.sparsity) for layer in layers(3, 0.5, None)]

    svg = heat_map(values, as_percent, highest=1.0, title="t")

    tips = re.findall(r'fill-opacity="0.500"><title>(.*?)</title>', svg)
    assert len(tips) == 3 * 7
    assert tips[0] == "model.layers.0.self_attn.q_proj: 50.0%"


def test_an_unmeasured_layer_is_an_empty_cell() -> None:
    svg = heat_map([(layer.name, None) for layer in layers(1, None, None)], as_percent, highest=0.0, title="t")

    assert svg.count('class="cell none"') == 7


def test_curves_are_written_as_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"

    curves_png(full_report().curves, path)

    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("scale", [1e-4, -3e-5, 4.0, 98_765.0, 2e9])
def test_no_label_leaves_its_chart(scale: float) -> None:
    lines = [
        Curve(name="n", x=(1.0, 2e6), y=(scale, 1.0371 * scale), x_label="tokens", y_label=label)
        for label in ("a", "b")
    ]
    figure = drawn(lines)
    figure.draw_without_rendering()

    width, height = figure.bbox.width / len(lines), figure.bbox.height
    for number, axes in enumerate(figure.axes):
        box = axes.get_tightbbox()
        assert box is not None
        assert number * width <= box.x0 < box.x1 <= (number + 1) * width
        assert 0 <= box.y0 < box.y1 <= height
