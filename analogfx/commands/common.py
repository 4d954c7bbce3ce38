"""What subcommands that show a table share: a saved model in, a table or a file out."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol, TextIO

from torch import nn

from analogfx import imports
from analogfx.checkpoint import load
from analogfx.errors import AnalogfxError


class CommandError(AnalogfxError):
    """What a command was given does not do."""


class Result(Protocol):
    """What a verb returns: a table to print, and the same as JSON, CSV and a picture."""

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON."""

    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None:
        """As CSV."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a saved model."""
    where = "of a module that is installed or in the current folder"
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FACTORY",
        help=f"function that returns the digital model, {where}",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="what analogfx.save() wrote"
    )


def saved_model(arguments: argparse.Namespace) -> Any:
    """The saved model, in eval mode.

    Raises:
        CommandError: there is no such function, or it returns no model.
        CheckpointError: the checkpoint is not that of the model.
    """
    digital = imports.call("--model", arguments.model, CommandError)
    if not isinstance(digital, nn.Module):
        raise CommandError(
            f"--model {arguments.model} returned a {type(digital).__name__}, not an nn.Module"
        )
    return load(digital, arguments.checkpoint, inplace=True).eval()


def add_output(parser: argparse.ArgumentParser, picture: bool = True, html: bool = True) -> None:
    """The options that say in what form the result comes."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of the table")
    form.add_argument("--csv", action="store_true", help="print CSV instead of the table")
    if html:
        parser.add_argument(
            "--html", type=Path, metavar="FILE", help="write a page for a browser, too"
        )
    if picture:
        parser.add_argument(
            "--picture", type=Path, metavar="FILE", help="draw it, too; needs matplotlib"
        )


def show(result: Result, arguments: argparse.Namespace) -> None:
    """Print a result in the form that was asked for, and draw it where that was."""
    if arguments.json:
        print(result.to_json())
    elif arguments.csv:
        result.to_csv(sys.stdout)
    else:
        print(result)
    if getattr(arguments, "html", None) is not None:
        page: Any = result
        page.to_html(arguments.html)
    picture = getattr(arguments, "picture", None)
    if picture is not None:
        _draw(result, picture)


def _draw(result: Any, picture: Path) -> None:
    """A picture in one step: an interrupted one leaves what was there."""
    with tempfile.TemporaryDirectory(dir=picture.parent, prefix=".drawing-") as scratch:
        drawn = Path(scratch, picture.name)
        try:
            result.plot(drawn)
        except ValueError as error:  # an ending that matplotlib does not know
            raise CommandError(f"--picture {picture}: {error}") from error
        except ModuleNotFoundError as error:
            raise CommandError(f"--picture needs matplotlib: {error}") from error
        os.replace(drawn, picture)


def whole(lowest: int) -> Any:
    """A parser of whole numbers from ``lowest`` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number, {lowest} or more")
        return int(text)

    return parse
