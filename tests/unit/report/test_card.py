"""The card: front matter that a hub reads, and a text that holds the facts."""

from dataclasses import replace

import pytest
import yaml

from overhaul.report.card import CardData, model_card
from overhaul.report.facts import Report
from overhaul.report.tables import markdown_table

from .examples import full_report


def card(report: Report, **changes: object) -> str:
    given = {
        "name": "won-back",
        "license": "apache-2.0",
        "base_model": "smollm2-135m",
        "relation": "finetune",
        "datasets": [CardData(name="austen", license="public domain")],
        "citations": ["@article{zimmer2023perp}"],
    }
    return model_card(report, **{**given, **changes})  # type: ignore[arg-type]


def front_matter(text: str) -> dict:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_front_matter_uses_the_words_of_hubs() -> None:
    assert front_matter(card(full_report())) == {
        "base_model": "smollm2-135m",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["overhaul", "wanda", "perp"],
        "model-index": [
            {
                "name": "won-back",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "austen", "type": "austen"},
                        "metrics": [{"type": "perplexity", "value": 49.1}],
                    }
                ],
            }
        ],
    }


def test_a_merge_has_several_bases_and_only_hub_corpora_are_linked() -> None:
    corpora = [
        CardData(name="boolq", license="cc-by-sa-3.0", hub_name="google/boolq"),
        CardData(name="x", license="?"),
    ]

    matter = front_matter(card(full_report(), base_model=["a", "b"], relation="merge", datasets=corpora))

    assert matter["base_model"] == ["a", "b"]
    assert matter["datasets"] == ["google/boolq"]


@pytest.mark.parametrize("name", ["a: b", "yes", "1e3", "#1", "- x", "---", "\"'", "größe/模型"])
def test_any_name_survives_the_front_matter(name: str) -> None:
    matter = front_matter(card(Report(title="t", facts=full_report().facts[:1]), base_model=name))

    assert matter["base_model"] == name


def test_the_text_has_its_sections_in_order() -> None:
    text = card(full_report())

    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "What was done",
        "Before and after",
        "Use",
        "Limits",
        "Data",
        "Recipe",
        "Lineage",
        "Citation",
    ]
    assert markdown_table(full_report().facts) in text
    assert "AutoModelForCausalLM.from_pretrained('won-back'" in text
    assert "- austen: public domain" in text
    assert "method: perp" in text
    assert "\n\n\n" not in text


def test_a_card_says_when_nothing_got_worse() -> None:
    dense = full_report().facts[0]

    text = card(Report(title="t", facts=(dense, replace(dense, label="copy"))))

    assert "Nothing that was measured got worse" in text


def test_an_own_snippet_replaces_the_default() -> None:
    assert "from peft import" in card(full_report(), use_snippet="from peft import AutoPeftModelForCausalLM")
