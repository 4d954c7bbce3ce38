"""The subcommand ``analogfx report``: what is analog in a saved model, what is not, and why."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import asdict
from typing import TextIO

from analogfx import files
from analogfx.commands.common import add_model, add_output, saved_model, show
from analogfx.page.charts import shares
from analogfx.page.document import Document
from analogfx.report import Report, report
from analogfx.tables import fold, write_csv


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to a parser's."""
    text = "List the products of a saved model, analog and digital, and why."
    parser = commands.add_parser("report", help=text, description=text)
    add_model(parser)
    add_output(parser, picture=False)
    parser.set_defaults(run=_run)


class _Shown:
    """A report as commands show it."""

    def __init__(self, found: Report) -> None:
        self.found = found

    def __str__(self) -> str:
        return str(self.found)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON, written to a file if one is named."""
        return files.json_text(self.found.to_dict(), path)

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """Every product, one a line; sizes joined by x."""
        columns = self.found.columns()
        extra = {name: columns[name] for name in ("config", "range") if name in columns}
        rows = [asdict(site) for site in self.found.sites]
        for row, *cells in zip(rows, *extra.values(), strict=True):
            row.update(zip(extra, cells, strict=True))
        header = list(rows[0]) if rows else []
        values = (
            ["x".join(map(str, v)) if isinstance(v, tuple) else v for v in row.values()]
            for row in rows
        )
        write_csv(path, header, values)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One HTML file with the table, repeated layers as one row."""
        found = self.found
        page = Document("What is analog, and what is not")
        counts = Counter(site.status for site in found.sites)
        page.numbers(
            [
                ("products", str(len(found.sites))),
                ("analog", str(counts["analog"])),
                ("analog weights", f"{found.coverage:.1%}"),
            ]
        )
        page.picture(shares([("analog", found.coverage), ("digital", 1 - found.coverage)]))
        columns = found.columns()
        rows = zip(*columns.values(), strict=True)
        folded = fold((name, tuple(cells)) for name, *cells in rows)
        last = len(columns) - 1
        page.table(tuple(columns), [(name, *cells) for name, _, cells in folded], texts=(last,))
        page.write(path)


def _run(arguments: argparse.Namespace) -> None:
    show(_Shown(report(saved_model(arguments))), arguments)
