"""The subcommand ``analogfx report``: what is analog in a saved model, what is not, and why."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from analogfx.commands.common import add_model, add_output, saved_model, show
from analogfx.report import Report, report
from analogfx.tables import write_csv


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
        text = json.dumps(self.found.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """Every product, one a line; sizes joined by x."""
        rows = [asdict(site) for site in self.found.sites]
        header = list(rows[0]) if rows else []
        values = (
            ["x".join(map(str, v)) if isinstance(v, tuple) else v for v in row.values()]
            for row in rows
        )
        write_csv(path, header, values)


def _run(arguments: argparse.Namespace) -> None:
    show(_Shown(report(saved_model(arguments))), arguments)
