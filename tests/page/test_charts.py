import xml.etree.ElementTree as ET

import pytest

from analogfx.page import charts


def parsed(svg):
    return ET.fromstring(svg)


def rectangles(svg, kind):
    return [
        tuple(float(r.get(name)) for name in ("x", "y", "width", "height"))
        for r in parsed(svg).iter("rect")
        if r.get("class") == kind
    ]


def test_bars_are_as_long_as_their_values():
    svg = charts.bars(["a", "b <c>", "d"], [2.0, -1.0, 0.5], [0.0, 0.0, 0.0], "effect")
    (x1, _, w1, _), (x2, _, w2, _), (x3, _, w3, _) = rectangles(svg, "bar")
    assert w1 == pytest.approx(2 * w2, abs=0.2) and w1 == pytest.approx(4 * w3, abs=0.3)
    assert x1 == x3 == pytest.approx(x2 + w2, abs=0.2)  # all begin or end at 0
    assert "b <c>" in [t.text for t in parsed(svg).iter("text")]


def test_errors_reach_to_either_side():
    svg = charts.bars(["a"], [2.0], [0.5], "effect")
    (x, _, width, _), (line,) = (
        rectangles(svg, "bar")[0],
        [e for e in parsed(svg).iter("line") if e.get("class") == "error"],
    )
    first, last = float(line.get("x1")), float(line.get("x2"))
    assert (first + last) / 2 == pytest.approx(x + width, abs=0.1)
    assert (last - first) / width == pytest.approx(0.5, abs=0.01)


def test_bars_of_nothing_but_zeros():
    assert [w for _, _, w, _ in rectangles(charts.bars(["a"], [0.0], [0.0], "x"), "bar")] == [0.5]


def test_a_band_holds_its_line():
    svg = parsed(charts.band(["1 s", "1 h"], [2.0, 1.0], [1.0, 0.0], [3.0, 2.0], 2.0, "time"))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    area = [tuple(map(float, p.split(","))) for p in svg.find("polygon").get("points").split()]
    upper, lower = area[:2], area[:1:-1]
    for (x, y), (xu, yu), (xl, yl) in zip(points, upper, lower, strict=True):
        assert x == xu == xl and y == pytest.approx((yu + yl) / 2, abs=0.1)
    assert points[0][1] < points[1][1]  # larger is higher
    (level,) = [e for e in svg.iter("line") if e.get("class") == "reference"]
    assert float(level.get("y1")) == pytest.approx(points[0][1], abs=0.1)


def test_boxes_lie_where_they_are_told_and_say_what_they_are():
    svg = parsed(charts.boxes([(0, 0, 10, 10)], [(1, 2, 3, 4, 0, "a & b")], 12, 12))
    frame, box = svg.iter("rect")
    assert [float(box.get(k)) for k in ("x", "y", "width", "height")] == [1, 2, 3, 4]
    assert box.find("title").text == "a & b" and frame.get("class") == "frame"


def test_shares_fill_the_bar():
    svg, _, rest = charts.shares([("analog", 0.75), ("digital", 0.25)]).partition("<ul")
    (a,), (b,) = rectangles(svg, "bar"), rectangles(svg, "other")
    assert a[2] == 480 and b[0] == 480 and b[2] == 160
    assert "analog 75.0%" in rest and "digital 25.0%" in rest


def test_neighbours_differ():
    hues = [charts.hue(n) for n in range(24)]
    assert len(set(hues)) == 24
