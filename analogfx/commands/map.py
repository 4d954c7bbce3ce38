"""The subcommand ``analogfx map``: a saved model's tile map."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from analogfx import imports
from analogfx.commands.common import CommandError, add_model, add_output, saved_model, show, whole
from analogfx.tiles.export import export_tiles
from analogfx.tiles.tile_map import FILLS, GROUPINGS, TileMap, tile_map


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to a parser's."""
    text = "Show on which crossbars the weights of a saved model lie."
    parser = commands.add_parser("map", help=text, description=text)
    add_model(parser)
    parser.add_argument(
        "--crossbar", type=_size, default=(512, 512), metavar="RxC", help="default: 512x512"
    )
    add_mapping(parser)
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="write what every crossbar holds there; see analogfx.export_tiles",
    )
    add_output(parser)
    parser.set_defaults(run=_run)


def add_mapping(parser: argparse.ArgumentParser) -> None:
    """The options that say how weights are cut and counted."""
    parser.add_argument(
        "--inputs",
        metavar="MODULE:FUNCTION",
        help="function that returns what a forward takes, to count what it does",
    )
    parser.add_argument("--single", action="store_true", help="one device a cell, not a pair")
    parser.add_argument(
        "--slices", type=whole(1), default=1, metavar="N", help="cells a weight (default: 1)"
    )
    parser.add_argument("--fill", choices=FILLS, default="even", help="default: even")
    parser.add_argument("--pack", action="store_true", help="several parts on one crossbar")
    parser.add_argument("--grouping", choices=GROUPINGS, default="diagonal")


def mapped(analog: Any, arguments: argparse.Namespace, crossbar: tuple[int, int]) -> TileMap:
    """The map of a model that a command's arguments ask for."""
    inputs = None
    if arguments.inputs is not None:
        inputs = imports.call("--inputs", arguments.inputs, CommandError)
    return tile_map(
        analog,
        crossbar,
        not arguments.single,
        arguments.slices,
        arguments.fill,
        arguments.pack,
        arguments.grouping,
        inputs,
    )


def _size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    parse = whole(1)
    return parse(rows), parse(columns)


def _run(arguments: argparse.Namespace) -> None:
    analog = saved_model(arguments)
    found = mapped(analog, arguments, arguments.crossbar)
    if arguments.export is not None:
        export_tiles(analog, arguments.export, mapped=found)
    show(found, arguments)
