"""Tables as text and as CSV, with repeated layers as one row: ``layers.{0..31}.fc1``."""

from __future__ import annotations

import csv
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

RowT = TypeVar("RowT", bound=Hashable)


def fold(rows: Iterable[tuple[str, RowT]]) -> list[tuple[str, int, RowT]]:
    """Rows that differ in one number of their names alone, as one row.

    Args:
        rows: (dotted name, what else the row shows).

    Returns:
        (name, how many rows it stands for, what the row shows), in order of first appearance.
        Numbers fold where they follow each other without a gap.

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


_Folded = tuple[tuple[str, ...], tuple[str, ...], RowT]
"""Parts of the name, the names that it stands for, what else the row shows."""


def _fold(rows: Iterable[tuple[str, RowT]]) -> list[tuple[str, tuple[str, ...], RowT]]:
    folded: list[_Folded[RowT]] = [(tuple(name.split(".")), (name,), row) for name, row in rows]
    for place in reversed(range(max((len(parts) for parts, _, _ in folded), default=0))):
        folded = _folded_at(folded, place)
    return [(".".join(parts), members, row) for parts, members, row in folded]


def _folded_at(rows: Sequence[_Folded[RowT]], place: int) -> list[_Folded[RowT]]:
    """Rows folded over the numbers at one place of their names."""
    groups: dict[Hashable, list[_Folded[RowT]]] = {}
    for parts, members, row in rows:
        number = len(parts) > place and parts[place].isdecimal()
        others = parts[:place] + parts[place + 1 :]
        key = (others, len(members), row) if number else (parts,)
        groups.setdefault((number, len(parts), key), []).append((parts, members, row))
    out: list[_Folded[RowT]] = []
    for group in groups.values():
        numbers = [int(parts[place]) for parts, _, _ in group] if len(group) > 1 else []
        if numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            parts, _, row = group[0]
            span = f"{{{numbers[0]}..{numbers[-1]}}}"
            members = tuple(name for _, some, _ in group for name in some)
            out.append(((*parts[:place], span, *parts[place + 1 :]), members, row))
        else:
            out += group
    return out


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
        with Path(target).open("w", newline="", encoding="utf-8") as stream:
            write_csv(stream, header, rows)
        return
    writer = csv.writer(target)
    writer.writerow(header)
    writer.writerows(rows)
