"""The shell command ``analogfx``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from analogfx import __version__, demo, lifetime_command
from analogfx.calibration import command as calibrate_command
from analogfx.errors import AnalogfxError
from analogfx.onnx import commands as onnx_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status.

    An error that analogfx raises on purpose is told on stderr, without a traceback, and gives 2.

    Args:
        argv: Arguments after the program's name; None takes those of the process.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except AnalogfxError as error:
        print(f"analogfx: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="analogfx", description="Compile PyTorch models for analog in-memory-computing chips."
    )
    parser.add_argument("--version", action="version", version=f"analogfx {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    lifetime_command.add(commands)
    calibrate_command.add(commands)
    onnx_commands.add(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Train a small CNN on handwritten digits for an analog chip, and show what that gains."
    parser = commands.add_parser("demo", help=text, description=text)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--seed",
        type=_whole_number(0),
        metavar="N",
        help="of the data split, the trainings and the noise (default: 0)",
    )
    parser.add_argument(
        "--epochs",
        type=_whole_number(1),
        metavar="N",
        help="of each of the three trainings (default: 30, or 12 with --quick)",
    )
    parser.add_argument("--quick", action="store_true", help="a rough result in a few seconds")
    parser.set_defaults(run=_run_demo)


def _whole_number(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {lowest} on")
        return int(text)

    return parse


def _run_demo(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in ("seed", "epochs")}
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = demo.quick(**chosen) if arguments.quick else demo.Settings(**chosen)
    print(demo.table(demo.run(arguments.out, settings)))
    print(f"\nWritten to {arguments.out.resolve()}: {', '.join(demo.FILES)}")
