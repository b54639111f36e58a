from __future__ import annotations

import json

from overhaul.lineage import DataUsed, LineageStep, Parent, flat_fields, nested_fields

STEP = LineageStep(
    verb="adapt",
    method="perp",
    fields={"train": ["norms"], "steps": 5},
    non_default=("steps",),
    parents=(Parent(path="/models/a", hash="ab"),),
    data=DataUsed(name="sample", fingerprint="f", tokens=7),
    seed=3,
    seconds=1.5,
    peak_rss_bytes=10,
)


def test_a_step_comes_back_from_json():
    stored = json.loads(json.dumps(STEP.to_json()))

    assert LineageStep.from_json(stored) == STEP
    assert stored["parent"] == "/models/a"


def test_fields_of_a_later_version_are_ignored():
    assert LineageStep.from_json({**STEP.to_json(), "watts": 7}) == STEP


def test_nested_fields_become_flat_and_nested_again():
    nested, flat = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}, {"a": 1, "b.c": 2, "b.d.e": 3}

    assert flat_fields(nested) == flat
    assert nested_fields(flat) == nested
