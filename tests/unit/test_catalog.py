from __future__ import annotations

import pytest

from overhaul import catalog
from overhaul.errors import UserError
from overhaul.method import Method


def test_every_line_names_a_method_once():
    assert len({(entry.verb, entry.name) for entry in catalog.ENTRIES}) == len(catalog.ENTRIES)
    assert {entry.verb for entry in catalog.ENTRIES} == set(catalog.VERBS)
    assert all(issubclass(entry.load(), Method) for entry in catalog.ENTRIES)


def test_find():
    assert catalog.find("prune", "wanda").target == "prune.wanda:Wanda"
    with pytest.raises(UserError, match="did you mean 'prune'"):
        catalog.find("prun", "wanda")
    with pytest.raises(UserError, match="did you mean 'wanda'"):
        catalog.find("prune", "wnda")
    with pytest.raises(UserError, match="overhaul list prune"):
        catalog.find("prune", "xyz")


def test_what_writes_a_model():
    assert catalog.changes(catalog.find("prune", "wanda"))
    assert not catalog.changes(catalog.find("measure", "perplexity"))
