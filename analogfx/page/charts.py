"""Pictures as SVG whose colours follow the page's, light or dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

Rectangle = tuple[float, float, float, float, int, str]
"""x, y, width, height, number of its colour, what to say of it."""


def hue(number: int) -> str:
    """A colour that reads on light and on dark, and differs from its neighbours'."""
    return f"hsl({number * 137.508 % 360:.0f} 58% 52%)"


def legend(names: Sequence[str]) -> str:
    """What the colours stand for, in order of their numbers."""
    items = "".join(
        f'<li><i style="background:{hue(number)}"></i>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def boxes(
    frames: Sequence[tuple[float, float, float, float]],
    rectangles: Sequence[Rectangle],
    width: float,
    height: float,
) -> str:
    """Frames with coloured rectangles in them; pointing at one says what it is."""
    parts = [f'<rect class="frame" {_corner(*frame)}/>' for frame in frames]
    parts += [
        f'<rect {_corner(x, y, w, h)} fill="{hue(number)}"><title>{escape(text)}</title></rect>'
        for x, y, w, h, number, text in rectangles
    ]
    return _svg(width, height, parts)


def bars(names: Sequence[str], values: Sequence[float], errors: Sequence[float], label: str) -> str:
    """Horizontal bars from 0, with one error to either side."""
    left, right, step = 230.0, 560.0, 24.0
    low = min([0.0, *(v - e for v, e in zip(values, errors, strict=True))])
    high = max([0.0, *(v + e for v, e in zip(values, errors, strict=True))])
    across = _scale(low, high, left, right)
    parts = []
    for number, (name, value, error) in enumerate(zip(names, values, errors, strict=True)):
        y = number * step
        start, end = sorted((across(0.0), across(value)))
        shown = name if len(name) <= 34 else f"...{name[-31:]}"
        parts += [
            f'<text x="{left - 10}" y="{y + 16}" text-anchor="end">{escape(shown)}</text>',
            f'<rect class="bar" {_corner(start, y + 5, max(end - start, 0.5), 14)}/>',
        ]
        if error:
            first, last = across(value - error), across(value + error)
            parts.append(_line("error", first, y + 12, last, y + 12))
    bottom = len(names) * step + 4
    parts.append(_line("axis", across(0.0), 0.0, across(0.0), bottom))
    for value in {low, high} - {0.0}:
        text = f"{value:.3g}"
        parts.append(
            f'<text class="muted" x="{across(value):.1f}" y="{bottom + 14}" '
            f'text-anchor="middle">{text}</text>'
        )
    parts.append(
        f'<text class="muted" x="{(left + right) / 2}" y="{bottom + 32}" '
        f'text-anchor="middle">{escape(label)}</text>'
    )
    return _svg(right + 40, bottom + 40, parts, "chart")


def band(
    ticks: Sequence[str],
    middle: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    reference: float,
    label: str,
) -> str:
    """A line within a band over named points, and a level to compare with."""
    left, right, top, bottom = 90.0, 600.0, 12.0, 270.0
    lowest, highest = min([*low, reference]), max([*high, reference])
    across = _scale(0.0, max(len(ticks) - 1.0, 1.0), left + 20, right - 20)
    down = _scale(lowest, highest, bottom - 10, top + 10)
    xs = [across(float(n)) for n in range(len(ticks))]
    upper = [f"{x:.1f},{down(v):.1f}" for x, v in zip(xs, high, strict=True)]
    lower = [f"{x:.1f},{down(v):.1f}" for x, v in zip(xs, low, strict=True)]
    line = [f"{x:.1f},{down(v):.1f}" for x, v in zip(xs, middle, strict=True)]
    parts = [
        f'<polygon class="band" points="{" ".join([*upper, *reversed(lower)])}"/>',
        f'<polyline class="mean" points="{" ".join(line)}"/>',
        _line("reference", left, down(reference), right, down(reference)),
        _line("axis", left, top, left, bottom),
        _line("axis", left, bottom, right, bottom),
    ]
    for point in line:
        cx, cy = point.split(",")
        parts.append(f'<circle class="dot" cx="{cx}" cy="{cy}" r="3.5"/>')
    for x, text in zip(xs, ticks, strict=True):
        parts.append(
            f'<text class="muted" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{escape(text)}</text>"
        )
    labels = [reference, *(v for v in (lowest, highest) if abs(down(v) - down(reference)) > 14)]
    for value in labels:
        parts.append(
            f'<text class="muted" x="{left - 8}" y="{down(value) + 4:.1f}" '
            f'text-anchor="end">{value:.4g}</text>'
        )
    parts.append(
        f'<text class="muted" x="{(right + 10) / 2}" y="{bottom + 40}" text-anchor="middle">'
        f"{escape(label)}</text>"
    )
    return _svg(right + 10, bottom + 46, parts, "band-chart")


def shares(parts: Sequence[tuple[str, float]]) -> str:
    """One bar cut into two shares of 1, and what they are."""
    kinds = ("bar", "accent"), ("other", "warm")
    x, drawn, items = 0.0, [], []
    for (name, share), (kind, colour) in zip(parts, kinds, strict=True):
        wide, text = 640.0 * share, f"{escape(name)} {share:.1%}"
        drawn.append(f'<rect class="{kind}" {_corner(x, 0, wide, 22)}/>')
        items.append(f'<li><i style="background:var(--{colour})"></i>{text}</li>')
        x += wide
    return f'{_svg(640.0, 22.0, drawn)}<ul class="legend">{"".join(items)}</ul>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low if high > low and math.isfinite(high - low) else 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _corner(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(width: float, height: float, parts: Sequence[str], kind: str = "") -> str:
    inside = "\n".join(parts)
    return (
        f'<svg role="img" class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">\n{inside}\n</svg>'
    )
