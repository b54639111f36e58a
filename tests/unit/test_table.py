from __future__ import annotations

from overhaul.table import Curve, LayerMap, Row, Table

ROW = Row(model="m", metric="perplexity", value=2.0, low=1.0, high=3.0, count=4)
CURVE = Curve(name="c", x=(0.0,), y=(1.0,), x_label="x", y_label="y")
MAP = LayerMap(model="m", quantity="q", values=(("layers.0.up", 1.0),))


def test_tables_add_up_with_their_pictures() -> None:
    both = Table((ROW,), curves=(CURVE,)) + Table((ROW,), maps=(MAP,))

    assert both == Table((ROW, ROW), (CURVE,), (MAP,))


def test_only_pictures_that_are_there_are_in_the_json() -> None:
    assert Table((ROW,)).to_json().keys() == {"rows"}
    assert Table((ROW,), (CURVE,), (MAP,)).to_json().keys() == {"rows", "curves", "maps"}
    assert Table((), maps=(MAP,)).to_json()["maps"][0]["values"] == (("layers.0.up", 1.0),)
