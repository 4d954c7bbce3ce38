"""The subcommand ``analogfx analogize``: a checkpoint of an analog model from a digital one."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from analogfx import imports
from analogfx.api import analogize
from analogfx.checkpoint import save
from analogfx.commands.common import CommandError
from analogfx.commands.config_file import RECIPES, read_config
from analogfx.report import report


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to a parser's."""
    text = "Make a model analog and save it."
    parser = commands.add_parser("analogize", help=text, description=text)
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FACTORY",
        help="function that returns the digital model with its weights, of a module that is "
        "installed or in the current folder",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE",
        help=f"{', '.join(RECIPES)}, or a JSON file: a config, or configs by module pattern",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse if a product stays digital without being told"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config)
    digital = imports.call("--model", arguments.model, CommandError)
    if not isinstance(digital, nn.Module):
        raise CommandError(
            f"--model {arguments.model} returned a {type(digital).__name__}, not an nn.Module"
        )
    analog = analogize(digital, config, inplace=True, strict=arguments.strict)
    save(analog, arguments.out)
    print(report(analog))
    print(f"\nWritten to {arguments.out.resolve()}")
