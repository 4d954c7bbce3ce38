"""Tables about a model in a terminal: what repeats in one row, wrapped to its width."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from analogfx.tables import fold

Row = tuple[str, ...]
"""The cells of one row; the first is the path of a module or parameter."""

_NARROWEST = 24
"""Columns that the last cell of a row gets, however narrow the terminal is."""


def counted(rows: Sequence[Row]) -> list[Row]:
    """Folded rows, with how many each stands for behind its path."""
    folded = fold((path, tuple(cells)) for path, *cells in rows)
    return [(f"{path}  ×{count}" if count > 1 else path, *cells) for path, count, cells in folded]


def text(header: Row, rows: Sequence[Row], width: int | None = None) -> str:
    """A table in plain text; the last column is wrapped to the width.

    Args:
        width: columns of the terminal; None to wrap nothing.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    before = sum(widths[:-1]) + 2 * (len(header) - 1)
    lines = [_line(header, widths), _line(tuple("-" * w for w in widths), widths)]
    if width is not None:
        widths[-1] = max(_NARROWEST, min(widths[-1], width - before))
        lines[1] = _line(tuple("-" * w for w in widths), widths)
    for row in rows:
        first, *more = textwrap.wrap(row[-1], widths[-1], break_on_hyphens=False) or [""]
        lines.append(_line((*row[:-1], first), widths))
        lines += [" " * before + rest for rest in more]
    return "\n".join(lines)


def _line(row: Row, widths: list[int]) -> str:
    return "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is, None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def show(header: Row, rows: Sequence[Row], styles: Sequence[str], below: Sequence[str]) -> None:
    """Print a table: in colours where stdout is a terminal, in plain text elsewhere.

    Args:
        styles: a style of rich's for each row, empty for none.
        below: lines under the table.
    """
    if not sys.stdout.isatty():
        print(text(header, rows), *below, sep="\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        last = number == len(header) - 1
        table.add_column(name, overflow="fold", ratio=1 if last else None)
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*map(Text, row), style=style)
    console = Console()
    console.print(table)
    for line in below:
        console.print(Text(line))
