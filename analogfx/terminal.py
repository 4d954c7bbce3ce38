"""Tables about a model in a terminal: what repeats in one row, wrapped to its width.

Rows of layers that differ by their numbers alone are folded: ``layers.{0..31}.mlp.up`` stands for
32 rows.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

Row = tuple[str, ...]
"""The cells of one row; the first is the path of a module or parameter."""

_NARROWEST = 24
"""Columns that the last cell of a row gets, however narrow the terminal is."""


def fold(rows: Sequence[Row]) -> list[tuple[Row, int]]:
    """Rows that differ only by numbers in their path, as one.

    Args:
        rows: cells; the first one is a path with dots.

    Returns:
        Rows in the order of their first appearance, and how many each stands for.

    Example:
        >>> fold([("h.0.fc", "linear"), ("h.1.fc", "linear"), ("head", "linear")])
        [(('h.{0..1}.fc', 'linear'), 2), (('head', 'linear'), 1)]
    """
    groups: dict[Row, list[tuple[int, ...]]] = {}
    for path, *cells in rows:
        parts = path.split(".")
        numbers = tuple(int(p) for p in parts if p.isdecimal())
        pattern = ".".join("{}" if p.isdecimal() else p for p in parts)
        groups.setdefault((pattern, *cells), []).append(numbers)
    return [
        ((_filled(pattern, block), *cells), len(block) * times)
        for (pattern, *cells), numbers in groups.items()
        for block, times in _blocks(numbers)
    ]


def _blocks(numbers: list[tuple[int, ...]]) -> Iterator[tuple[list[tuple[int, ...]], int]]:
    """Numbers as full grids, each with how often it comes."""
    distinct = sorted(set(numbers))
    axes = [sorted(set(axis)) for axis in zip(*distinct, strict=True)]
    if distinct == [*itertools.product(*axes)] and len(numbers) % len(distinct) == 0:
        yield distinct, len(numbers) // len(distinct)
        return
    if len(axes) < 2:  # some come more often than others
        for value in distinct:
            yield [value], numbers.count(value)
        return
    for first in axes[0]:
        yield from _blocks([n for n in numbers if n[0] == first])


def _filled(pattern: str, block: list[tuple[int, ...]]) -> str:
    axes = [sorted(set(axis)) for axis in zip(*block, strict=True)]
    for axis in axes:
        pattern = pattern.replace("{}", _numbers(axis), 1)
    return pattern


def _numbers(axis: list[int]) -> str:
    """A number, or several in braces; never ``{}``."""
    if len(axis) == 1:
        return str(axis[0])
    if axis[-1] - axis[0] == len(axis) - 1:
        return f"{{{axis[0]}..{axis[-1]}}}"
    return f"{{{','.join(map(str, axis))}}}"


def counted(rows: Sequence[Row]) -> list[Row]:
    """Folded rows, with how many each stands for behind its path."""
    return [
        (f"{path}  ×{count}" if count > 1 else path, *cells) for (path, *cells), count in fold(rows)
    ]


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
