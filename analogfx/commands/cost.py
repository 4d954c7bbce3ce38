"""The subcommand ``analogfx cost``: what a forward of a saved model takes on a chip."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from analogfx.commands.common import CommandError, add_model, add_output, saved_model, show
from analogfx.commands.map import add_mapping, mapped
from analogfx.hardware import PRESETS, Hardware
from analogfx.tiles.cost import cost


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to a parser's."""
    text = "Show what energy, time and area a forward of a saved model takes."
    parser = commands.add_parser("cost", help=text, description=text)
    add_model(parser)
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="NAME|FILE",
        help=f"{', '.join(PRESETS)}, or a JSON file with the fields of analogfx.hardware.Hardware",
    )
    add_mapping(parser)
    add_output(parser, picture=False, html=False)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    chip = _hardware(arguments.hardware)
    size = chip.crossbar_rows, chip.crossbar_columns
    show(cost(mapped(saved_model(arguments), arguments, size), chip), arguments)


def _hardware(name: str) -> Hardware:
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise CommandError(f"--hardware {name}: expected {', '.join(PRESETS)}, or a JSON file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CommandError(f"--hardware {name}: no JSON ({error})") from error
    if not isinstance(data, dict):
        raise CommandError(f"--hardware {name}: expected a JSON object")
    return Hardware.from_dict(data)
