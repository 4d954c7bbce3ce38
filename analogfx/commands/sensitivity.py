"""The subcommand ``analogfx sensitivity``: which layer of a saved model hurts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from analogfx import imports
from analogfx.commands.common import CommandError, add_model, add_output, saved_model, show, whole
from analogfx.lifetime import seconds
from analogfx.lifetime_command import COMPENSATION, NOISE
from analogfx.search.perturb import ChangedConfig, Digital, Perturbation, ProgrammingNoise
from analogfx.search.sensitivity import MODES, sensitivity


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to a parser's."""
    text = "Measure what perturbing one layer of a saved model, or all but one, does to a metric."
    parser = commands.add_parser("sensitivity", help=text, description=text)
    add_model(parser)
    parser.add_argument(
        "--metric", required=True, metavar="MODULE:FUNCTION", help="model -> number"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--noise", choices=NOISE, help="default: what the configs say")
    what.add_argument(
        "--set",
        action="append",
        type=_field,
        metavar="FIELD=VALUE",
        help="a field of every config, such as forward.inp_res=14; may be given several times",
    )
    what.add_argument("--digital", action="store_true", help="make the layers digital")
    parser.add_argument("--compensation", choices=COMPENSATION, help="default: as the configs say")
    parser.add_argument(
        "--time", type=_time, default=1.0, metavar="T", help="after programming, such as 1d"
    )
    parser.add_argument("--mode", choices=MODES, default="alone", help="default: alone")
    parser.add_argument("--chips", type=whole(1), default=5, metavar="N", help="default: 5")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default: 0")
    parser.add_argument("--minimize", action="store_true", help="a smaller metric is better")
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="keep measurements, to go on after an interrupt"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_output(parser)
    parser.set_defaults(run=_run)


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:  # the name of an enumeration's member
        return name, value


def _time(text: str) -> float:
    try:
        return seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _perturbation(arguments: argparse.Namespace) -> Perturbation:
    if arguments.set:
        return ChangedConfig(dict(arguments.set))
    if arguments.digital:
        return Digital()
    noise = NOISE[arguments.noise]() if arguments.noise else None
    factor = COMPENSATION[arguments.compensation]() if arguments.compensation else None
    return ProgrammingNoise(noise, factor, arguments.time)


def _run(arguments: argparse.Namespace) -> None:
    metric = imports.function("--metric", arguments.metric, CommandError)
    found = sensitivity(
        saved_model(arguments),
        metric,
        _perturbation(arguments),
        arguments.mode,
        arguments.chips,
        arguments.seed,
        not arguments.minimize,
        arguments.file,
        not arguments.quiet,
    )
    show(found, arguments)
