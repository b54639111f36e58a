"""The page parses, loads nothing, runs nothing of the user's, and shows the facts."""

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from overhaul.report.facts import Report
from overhaul.report.html import curve_figure, html_report, layer_figures
from overhaul.report.tables import before_after

from .examples import PROMPTS, full_report, layers

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags with attributes, and the texts of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def eight_models() -> Report:
    report = full_report()
    facts = tuple(replace(report.facts[i % 3], label=f"model {i}", layers=layers(2, 0.5, 0.01 * i)) for i in range(8))
    return Report(title="Eight", facts=facts)


@pytest.mark.parametrize(
    "report",
    [full_report(), Report(title="One", facts=full_report().facts[:1]), eight_models()],
    ids=["3", "1", "8"],
)
def test_pages_are_balanced_and_show_every_cell_of_the_table(report: Report) -> None:
    page = Page(html_report(report))

    assert page.open == []
    cells = {text for row in before_after(report.facts).rows for cell in row for text in (cell.text, cell.ends)}
    assert cells <= {*page.texts, ""}


def test_nothing_is_loaded() -> None:
    text = html_report(full_report())

    for tag, attributes in Page(text).tags:
        assert "src" not in attributes
        assert tag not in {"link", "img", "iframe", "object"}
        if tag != "a":
            assert "href" not in attributes
    assert "@import" not in text
    assert "url(" not in text


def test_every_text_of_the_user_is_escaped() -> None:
    evil = '<script>alert(1)</script>"&'
    report = full_report()
    step = replace(report.lineage[0], method=evil, fields={evil: evil}, non_default=(evil,), command=evil)
    facts = tuple(replace(one, label=evil, path=evil, corpus=evil, generations=((evil, evil),)) for one in report.facts)
    curves = tuple(replace(curve, name=evil, y_label=evil, x_label=evil) for curve in report.curves)

    text = html_report(
        Report(
            title=evil,
            facts=(*facts[:2], replace(facts[2], layers=(replace(facts[2].layers[0], name=evil),))),
            lineage=(step,),
            curves=curves,
            recipe_yaml=evil,
            commands=(evil,),
            environment={evil: evil},
            warnings=(evil,),
        )
    )

    assert "<script>alert" not in text
    page = Page(text)
    assert page.open == []
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_sections_appear_only_with_something_to_say() -> None:
    bare = replace(full_report().facts[0], generations=())

    full, small = (
        re.findall(r"<h2[^>]*>(.*?)</h2>", html_report(report))
        for report in (full_report(), Report(title="One", facts=(bare,)))
    )

    assert small == ["Before and after"]
    assert full == [
        "Before and after",
        "Recovery",
        "Training",
        "Layers",
        "Generations",
        "Lineage",
        "Settings",
        "Do it again",
        "Environment",
        "Warnings",
    ]


def test_chosen_settings_are_bold_and_defaults_are_not() -> None:
    text = html_report(full_report())

    assert "<strong>train.steps 100</strong>" in text
    assert "<strong>rank 8</strong>" not in text
    assert "rank 8" in text


def test_each_prompt_stands_above_the_texts_of_all_models() -> None:
    texts = Page(html_report(full_report())).texts

    start = texts.index(PROMPTS[1])
    labels = [text for text in texts[start : texts.index(PROMPTS[2])] if text in {"dense", "pruned", "won back"}]
    assert labels == ["dense", "pruned", "won back"]


def test_every_chart_is_named_and_has_a_table() -> None:
    tags = Page(html_report(full_report())).tags

    charts = [attributes for tag, attributes in tags if tag == "svg"]
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert len(charts) == sum(tag == "details" for tag, _ in tags)


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
