"""An HTML file of headings, numbers, tables and pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape

from analogfx import files

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2024; --paper: #ffffff; --muted: #5b6670;
  --line: #d8dde1; --soft: #f3f5f6; --accent: #2563b8; --warm: #b8572a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ea; --paper: #15181b; --muted: #9aa5ae; --line: #343b41; --soft: #1e2327;
    --accent: #6aa5f2; --warm: #e8915f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.4rem; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
p { max-width: 46rem; }
.numbers { display: flex; flex-wrap: wrap; gap: 0.5rem; margin: 0; }
.numbers div { background: var(--soft); border-radius: 6px; padding: 0.5rem 0.8rem; }
.numbers dt { color: var(--muted); font-size: 0.8rem; }
.numbers dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; min-width: 8rem; }
svg { display: block; max-width: 100%; height: auto; margin: 0.5rem 0; }
svg.chart { min-width: 34rem; }
svg text { fill: var(--ink); font: 12px system-ui, "DejaVu Sans", sans-serif; }
@media (max-width: 36rem) { svg.band-chart text { font-size: 17px; } }
svg .muted { fill: var(--muted); }
svg .frame { fill: none; stroke: var(--line); }
svg .axis { stroke: var(--muted); fill: none; }
svg .mean { stroke: var(--accent); fill: none; stroke-width: 2; }
svg .dot, svg .bar { fill: var(--accent); }
svg .band { fill: var(--accent); opacity: 0.22; }
svg .reference { stroke: var(--muted); stroke-dasharray: 5 4; fill: none; }
svg .other { fill: var(--warm); }
svg .error { stroke: var(--muted); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; padding: 0; margin: 0.3rem 0;
  list-style: none; font-size: 0.85rem; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px;
  margin-right: 0.35em; }
"""


class Document:
    """Parts of a page in order; :meth:`write` makes a file of them."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A heading of a part."""
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{escape(text)}</p>")

    def numbers(self, values: Iterable[tuple[str, str]]) -> None:
        """Numbers with what they are."""
        cells = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values
        )
        self.parts.append(f'<dl class="numbers">{cells}</dl>')

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[str]], texts: Sequence[int] = ()
    ) -> None:
        """A table; it scrolls where it is wider than the window.

        Args:
            texts: columns of words, which may break, by their number.
        """
        kinds = [' class="text"' if n in texts else "" for n in range(len(header))]

        def line(tag: str, cells: Sequence[str]) -> str:
            joined = "".join(
                f"<{tag}{kind}>{escape(cell)}</{tag}>"
                for kind, cell in zip(kinds, cells, strict=True)
            )
            return f"<tr>{joined}</tr>"

        body = "\n".join(line("td", row) for row in rows)
        self.parts.append(
            f'<div class="wide"><table><thead>{line("th", header)}</thead>\n'
            f"<tbody>{body}</tbody></table></div>"
        )

    def picture(self, svg: str) -> None:
        """A picture of :mod:`analogfx.page.charts`: markup, not text."""
        self.parts.append(f'<div class="wide">{svg}</div>')

    def html(self) -> str:
        """The whole file."""
        body = "\n".join(self.parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n{body}\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file in one step: an interrupted one leaves what was there."""
        files.write_text(path, self.html())
