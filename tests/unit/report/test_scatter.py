"""Points where they belong, names that can be read, a front with steps on the right side."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from overhaul.report.scatter import Point, scatter_chart


def point(label: str, x: float, y: float, *, is_best: bool = True) -> Point:
    return Point(label=label, x=x, y=y, low=y, high=y, is_best=is_best)


def chart(*points: Point, is_cost: bool = True) -> ElementTree.Element:
    svg = scatter_chart(points, x_label="size", y_label="perplexity", is_cost=is_cost, number="{:g}".format, title="t")
    assert "nan" not in svg
    return ElementTree.fromstring(svg)


def centres(svg: ElementTree.Element) -> dict[str, tuple[float, float]]:
    return {
        str(circle.findtext("title")).split(":")[0]: (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
        for circle in svg.iter("circle")
        if circle.attrib["class"].startswith("point")
    }


def front(svg: ElementTree.Element) -> str:
    (path,) = (path.attrib["d"] for path in svg.iter("path"))
    return path


def test_more_is_right_and_a_higher_perplexity_is_higher() -> None:
    at = centres(chart(point("small", 1, 30), point("large", 2, 20)))

    assert at["small"][0] < at["large"][0]
    assert at["small"][1] < at["large"][1]  # SVG counts downwards


def test_factors_take_equal_lengths_where_values_range_widely() -> None:
    at = centres(chart(point("a", 1, 10), point("b", 10, 20), point("c", 100, 40)))

    assert at["b"][0] - at["a"][0] == pytest.approx(at["c"][0] - at["b"][0], abs=0.2)
    assert at["a"][1] - at["b"][1] == pytest.approx(at["b"][1] - at["c"][1], abs=0.2)


def test_beaten_models_are_paler_and_off_the_front() -> None:
    svg = chart(point("best", 1, 20), point("beaten", 2, 30, is_best=False))

    kinds = [circle.attrib["class"] for circle in svg.iter("circle")]
    assert kinds == ["point best", "point beaten"]
    assert front(svg).count("H") == 0


@pytest.mark.parametrize(("is_cost", "order"), [(True, "HV"), (False, "VH")])
def test_steps_keep_to_what_some_model_reaches(is_cost: bool, order: str) -> None:
    """Between two sizes the better one is too large; between two speeds the faster one is too bad."""
    first, second = (point("a", 1, 30), point("b", 2, 20)) if is_cost else (point("a", 1, 20), point("b", 2, 30))

    svg = chart(first, second, is_cost=is_cost)

    assert re.sub(r"[^HV]", "", front(svg)) == order
    (x, y) = centres(svg)["b"]
    assert {f"H{x:.1f}", f"V{y:.1f}"} <= set(front(svg).split())


def boxes(svg: ElementTree.Element, labels: list[str]) -> list[tuple[float, float, float, float]]:
    found = []
    for text in svg.iter("text"):
        if text.text in labels:
            x, y, width = float(text.attrib["x"]), float(text.attrib["y"]), 6.3 * len(text.text)
            left = x - {"start": 0, "middle": width / 2, "end": width}[text.attrib["text-anchor"]]
            found.append((left, y - 10, left + width, y + 3))
    return found


def test_names_of_neighbours_do_not_cover_each_other_and_stay_inside() -> None:
    names = [f"model-{number}" for number in range(5)]
    crowd = [point(name, 100 + 3 * number, 20 + number) for number, name in enumerate(names)]

    svg = chart(*crowd, point("far-right-with-a-long-name", 160, 60))

    found = boxes(svg, [*names, "far-right-with-a-long-name"])
    assert len(found) == 6
    for index, (left, top, right, bottom) in enumerate(found):
        assert left >= 0
        assert right <= 480
        for other in found[:index]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (index, found)


@pytest.mark.parametrize("values", [[(1.0, 2.0)], [(1.0, 2.0), (1.0, 2.0)], [(0.0, 0.0), (5.0, 0.0)]])
def test_degenerate_sets_are_drawn(values: list[tuple[float, float]]) -> None:
    svg = chart(*(point(str(index), x, y) for index, (x, y) in enumerate(values)))

    assert len(centres(svg)) == len(values)


def test_the_reference_has_a_ring_and_names_are_escaped() -> None:
    svg = chart(Point(label="<b>", x=1, y=2, low=1.9, high=2.1, is_best=True, is_reference=True))

    assert [circle.attrib["class"] for circle in svg.iter("circle")] == ["ring", "point best"]
    assert "<b>" in [text.text for text in svg.iter("text")]
