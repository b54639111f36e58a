"""The page parses, loads nothing, runs nothing of the user's, and shows the facts."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from overhaul.journal import TableNote
from overhaul.report.facts import Report
from overhaul.report.html import html_measured, html_report
from overhaul.report.tables import before_after
from overhaul.table import Curve, LayerMap, Row, Table

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


def test_what_was_read_belongs_to_the_training_and_what_a_method_compared_does_not() -> None:
    read, compared = (
        TableNote(title=title, columns=("text", "tokens"), rows=(("<new>", "7"),)) for title in ("Read.", "Compared.")
    )

    text = html_report(replace(full_report(), training=(read,), tables=(compared,)))

    headings = re.findall(r"<h[23][^>]*>(.*?)</h[23]>", text)
    place = headings.index("What was compared")
    assert headings.index("Training") < headings.index("Read.") < place
    assert headings[place + 1] == "Compared."
    assert Page(text).texts.count("<new>") == 2


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


def test_a_comparison_has_its_trades_in_place_of_a_recovery() -> None:
    text = html_report(replace(full_report(), is_comparison=True, lineage=(), curves=(), recipe_yaml="", commands=()))

    assert Page(text).open == []
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == [
        "Side by side",
        "What quality costs",
        "Layers",
        "Generations",
        "Environment",
        "Warnings",
    ]
    assert "on the front" in Page(text).texts


MEASURED = Table(
    tuple(
        Row(model=model, metric=metric, value=value, low=0.9 * value, high=1.1 * value, count=100)
        for model, value in (("dense", 28.0), ("<small>", 49.0))
        for metric in ("perplexity", "accuracy/boolq")
    ),
    curves=(Curve(name="dense", x=(1.0, 2.0), y=(3.0, 4.0), x_label="layer", y_label="outliers", title="They <rise>"),),
    maps=(LayerMap(model="dense", quantity="outliers", values=(("layers.0.up", 3.0), ("layers.1.up", None))),),
)


def test_the_page_of_a_measure_has_a_row_for_each_model_and_its_pictures() -> None:
    text = html_measured(MEASURED, title="t", command="overhaul measure <x>", environment={"torch": "<2>"})

    page = Page(text)
    assert page.open == []
    start = page.texts.index("dense")
    first, second = ["28.00 [25.20, 30.80]"] * 2, ["49.00 [44.10, 53.90]"] * 2
    assert page.texts[start : start + 6] == ["dense", *first, "<small>", *second]
    assert "Perplexity: from 28.00 (dense) to 49.00 (<small>)." in page.texts
    assert "They <rise>" in page.texts
    assert sum(tag == "svg" for tag, _ in page.tags) == 2
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == ["Measured", "Curves", "Layers", "Do it again", "Environment"]


def test_models_of_a_measure_are_called_shortly_and_its_files_keep_their_paths() -> None:
    details = [{"model": "dense", "score": "loss"}, {"model": "<small>", "score": "dense"}]
    called = {"dense": "big", "<small>": "little"}

    text = html_measured(replace(MEASURED, details=details), title="t", command="c", environment={}, called=called)

    shown = Page(text).texts
    assert "Perplexity: from 28.00 (big) to 49.00 (little)." in shown
    assert {"2 rows", "big", "little"} <= set(shown)
    assert "<small>" not in shown
    assert text.count("%3Csmall%3E") == len(MEASURED.rows) // 2 + 1


def test_a_measure_without_pictures_is_a_table() -> None:
    text = html_measured(Table(MEASURED.rows), title="t", command="c", environment={})

    assert "<svg" not in text
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == ["Measured", "Do it again", "Environment"]
