"""The shell command ``analogfx``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from analogfx import __version__, demo, lifetime_command
from analogfx.calibration import command as calibrate_command
from analogfx.commands import analogize, config, cost, map, report, sensitivity
from analogfx.errors import AnalogfxError, abridged
from analogfx.onnx import commands as onnx_commands

SYSTEM = 1
"""Exit status where the system refused something: a disk is full, a file cannot be read."""
REFUSED = 2
"""Exit status of wrong usage, and of an error that analogfx raises on purpose."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as of a process that the signal ended."""
CLOSED = 141
"""Exit status where nobody reads the output any more, as of a process that SIGPIPE ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status: 0, or one of those above.

    Whatever is foreseen is told on stderr in one line, without a traceback.

    Args:
        argv: Arguments after the program's name; None takes those of the process.
    """
    try:
        try:
            arguments = _parser().parse_args(argv)
            arguments.run(arguments)
        finally:
            sys.stdout.flush()  # what cannot be written is to be known here
    except AnalogfxError as error:
        return _told(REFUSED, f"error: {error}")
    except KeyboardInterrupt:
        return _told(INTERRUPTED, "interrupted")
    except BrokenPipeError:
        _drop_output()
        return CLOSED
    except OSError as error:
        _drop_output()
        return _told(SYSTEM, f"error: {error}")
    return 0


def _told(status: int, message: str) -> int:
    print(f"analogfx: {message}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """Have Python not fail again at its end, when it writes what is left in its buffer."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # it is no file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="analogfx",
        description="Compile PyTorch models for analog in-memory-computing chips.",
        epilog="Exit status: 0 done; 1 the system refused something, such as a full disk; 2 wrong "
        "usage, or nothing that can be done; 130 interrupted; 141 nobody reads the output.",
    )
    parser.add_argument("--version", action="version", version=f"analogfx {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    config.add(commands)
    analogize.add(commands)
    report.add(commands)
    calibrate_command.add(commands)
    map.add(commands)
    cost.add(commands)
    sensitivity.add(commands)
    lifetime_command.add(commands)
    onnx_commands.add(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Train a small CNN on handwritten digits for an analog chip, and show what that gains."
    parser = commands.add_parser("demo", help=text, description=text)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--seed",
        type=_whole_number(0, 2**32 - 1),
        metavar="N",
        help="of the data split, the trainings and the noise (default: 0)",
    )
    parser.add_argument(
        "--epochs",
        type=_whole_number(1, 10**9),
        metavar="N",
        help="of each of the three trainings (default: 30, or 12 with --quick)",
    )
    parser.add_argument("--quick", action="store_true", help="a rough result in a few seconds")
    parser.set_defaults(run=_run_demo)


def _whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        # Python refuses to read thousands of digits.
        if not text.isdecimal() or len(text) > 20 or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(
                f"{abridged(text)}: expected a whole number, {lowest} to {highest}"
            )
        return int(text)

    return parse


def _run_demo(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in ("seed", "epochs")}
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = demo.quick(**chosen) if arguments.quick else demo.Settings(**chosen)
    print(demo.table(demo.run(arguments.out, settings)))
    print(f"\nWritten to {arguments.out.resolve()}: {', '.join(demo.FILES)}")
