"""Tables as text and as CSV, with repeated layers as one row: ``layers.{0..31}.fc1``."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from analogfx import files

RowT = TypeVar("RowT", bound=Hashable)


def fold(rows: Iterable[tuple[str, RowT]]) -> list[tuple[str, int, RowT]]:
    """Rows that differ by the numbers in their names alone, as one row.

    Args:
        rows: (name with dots, what else the row shows).

    Returns:
        (name, how many rows it stands for, what the row shows), in order of first appearance. The
        numbers in braces of a name stand for exactly the rows that there are.

    Example:
        >>> fold([("layers.0.fc", "8x8"), ("layers.1.fc", "8x8"), ("head", "2x8")])
        [('layers.{0..1}.fc', 2, '8x8'), ('head', 1, '2x8')]
    """
    return [(name, len(members), row) for name, members, row in _fold(rows)]


def fold_names(rows: Iterable[tuple[str, Hashable]]) -> dict[str, str]:
    """The name of the row of :func:`fold` that each name went to.

    Example:
        >>> fold_names([("layers.0.fc", "8x8"), ("layers.1.fc", "8x8"), ("head", "2x8")])
        {'layers.0.fc': 'layers.{0..1}.fc', 'layers.1.fc': 'layers.{0..1}.fc', 'head': 'head'}
    """
    return {member: name for name, members, _ in _fold(rows) for member in members}


_Numbers = tuple[int, ...]
"""The numbers in a name."""


def _fold(rows: Iterable[tuple[str, RowT]]) -> Iterator[tuple[str, list[str], RowT]]:
    """The name of each folded row, the names that it stands for, what else it shows."""
    groups: dict[tuple[str, RowT], dict[_Numbers, list[str]]] = {}
    for name, row in rows:
        parts = name.split(".")
        numbers = tuple(int(p) for p in parts if p.isdecimal())
        pattern = ".".join("{}" if p.isdecimal() else p for p in parts)
        groups.setdefault((pattern, row), {}).setdefault(numbers, []).append(name)
    for (pattern, row), names in groups.items():
        for block in _blocks({numbers: len(same) for numbers, same in names.items()}):
            yield _filled(pattern, block), [n for numbers in block for n in names[numbers]], row


def _blocks(times: dict[_Numbers, int]) -> Iterator[list[_Numbers]]:
    """Numbers, each with how often it comes, as full grids of numbers that come equally often."""
    numbers = sorted(times)
    axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
    if numbers == [*itertools.product(*axes)] and len(set(times.values())) == 1:
        yield numbers
        return
    if len(axes) < 2:  # some come more often than others
        yield from ([n] for n in numbers)
        return
    for first in axes[0]:
        yield from _blocks({n: times[n] for n in numbers if n[0] == first})


def _filled(pattern: str, block: list[_Numbers]) -> str:
    for axis in zip(*block, strict=True):
        pattern = pattern.replace("{}", _braces(sorted(set(axis))), 1)
    return pattern


def _braces(axis: list[int]) -> str:
    """A number, or several in braces; never ``{}``."""
    if len(axis) == 1:
        return str(axis[0])
    if axis[-1] - axis[0] == len(axis) - 1:
        return f"{{{axis[0]}..{axis[-1]}}}"
    return f"{{{','.join(map(str, axis))}}}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a text table: the first column to the left, all others to the right."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [header, ["-" * width for width in widths], *cells[1:]]
    return [
        "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def write_csv(
    target: str | os.PathLike[str] | TextIO, header: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Write a table as CSV, to a file or to a stream that is open; None is an empty field."""
    if isinstance(target, (str, os.PathLike)):
        text = io.StringIO(newline="")
        write_csv(text, header, rows)
        files.write_text(target, text.getvalue())
        return
    writer = csv.writer(target)
    writer.writerow(header)
    writer.writerows(rows)
