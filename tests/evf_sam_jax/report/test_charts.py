"""Lengths and places in the charts are those of the numbers."""

import xml.etree.ElementTree as ET

import pytest

from evf_sam_jax.report import charts


def percent(element: ET.Element, key: str) -> float:
    value = element.get(key)
    assert value is not None
    return float(value.removesuffix("%")) / 100


def by_class(svg: str) -> dict[str | None, list[ET.Element]]:
    found: dict[str | None, list[ET.Element]] = {}
    for element in ET.fromstring(svg):
        found.setdefault(element.get("class"), []).append(element)
    return found


def test_a_bar_is_as_long_as_its_value():
    found = by_class(charts.bar(0.62, 0.5, 0.7))
    (value,), (interval,) = found["value"], found["interval"]
    assert percent(value, "width") == pytest.approx(0.62)
    assert (percent(interval, "x1"), percent(interval, "x2")) == pytest.approx((0.5, 0.7))


@pytest.mark.parametrize("value, kind, begin", [(0.1, "gain", 0.5), (-0.1, "loss", 0.25)])
def test_a_difference_begins_in_the_middle(value: float, kind: str, begin: float):
    found = by_class(charts.difference_bar(value, value - 0.05, value + 9, 0.2))
    (drawn,), (interval,) = found[kind], found["interval"]
    assert (percent(drawn, "x"), percent(drawn, "width")) == pytest.approx((begin, 0.25))
    assert percent(interval, "x2") == 1  # cut


def test_columns_are_as_high_as_their_counts():
    found = by_class(charts.histogram([10, 0, 40], [0.0, 1.0, 2.0, 3.0], [20, 5, 0]))
    heights = {
        kind: [float(column.get("height", "nan")) for column in found[kind]]
        for kind in ("value", "other")
    }
    full = charts.HISTOGRAM_HEIGHT
    assert heights == {
        "value": [full / 4, 0, full],
        "other": [full / 2, pytest.approx(full / 8, abs=0.1), 0],
    }
    places = sorted(percent(c, "x") for kind in heights for c in found[kind])
    assert places == sorted(set(places)) and places[-1] < 1
