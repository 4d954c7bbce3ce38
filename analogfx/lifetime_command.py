"""The shell command ``analogfx evaluate``: a model's lifetime from a checkpoint."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from analogfx import chip
from analogfx.checkpoint import load
from analogfx.device import READ_NOISE
from analogfx.errors import AnalogfxError
from analogfx.lifetime import TIMES, evaluate, seconds

NOISE: dict[str, Any] = {
    "pcm": chip.PCMLikeNoiseModel,
    "hermes": chip.HermesNoiseModel,
    "state-independent": chip.StateIndependentNoiseModel,
    "reram-wan": chip.ReRamWan2022NoiseModel,
    "reram-cmo": chip.ReRamCMONoiseModel,
    "foundation": chip.FoundationNoiseModel,
    "additive": chip.AdditiveNoiseModel,
}
COMPENSATION: dict[str, Any] = {
    "global": chip.GlobalDriftCompensation,
    "per-column": chip.PerColumnDriftCompensation,
    "exact": chip.GlobalDriftCompensationWithExactReference,
}
FILES = ("life.json", "life.csv", "life.png")
JOURNAL = "life.journal"


class CommandError(AnalogfxError):
    """What a command was given does not do."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Measure a saved model on many chips, at several times after programming."
    parser = commands.add_parser("evaluate", help=text, description=text)
    parser.add_argument(
        "--model", required=True, metavar="PKG.MOD:FACTORY", help="makes the digital model"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--metric", required=True, metavar="PKG.MOD:FUNCTION", help="model -> number"
    )
    parser.add_argument("--noise", choices=NOISE, help="default: what the configs say")
    parser.add_argument("--compensation", choices=COMPENSATION, help="default: as the configs say")
    parser.add_argument(
        "--times", type=_times, default=TIMES, metavar="T,T,...", help="such as 1,3600,1d,1y"
    )
    parser.add_argument(
        "--read-noise", choices=READ_NOISE, default=READ_NOISE[0], help="when it is drawn anew"
    )
    parser.add_argument(
        "--output-noise", action="store_true", help="add the configs' output noise, too"
    )
    parser.add_argument("--chips", type=int, default=25, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"keep measurements in DIR/{JOURNAL}, and go on from those that are there",
    )
    parser.add_argument("--html", action="store_true", help="write life.html, too")
    parser.set_defaults(run=_run)


def _times(text: str) -> tuple[float, ...]:
    try:
        return tuple(seconds(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(arguments: argparse.Namespace) -> None:
    factory, metric = (_named(text) for text in (arguments.model, arguments.metric))
    if arguments.chips < 1:
        raise CommandError(f"--chips {arguments.chips}: expected 1 or more")
    analog = load(factory(), arguments.checkpoint).eval()
    arguments.out.mkdir(parents=True, exist_ok=True)
    life = evaluate(
        analog,
        metric,
        NOISE[arguments.noise]() if arguments.noise else None,
        COMPENSATION[arguments.compensation]() if arguments.compensation else None,
        arguments.times,
        arguments.chips,
        arguments.seed,
        read_noise=arguments.read_noise,
        output_noise=arguments.output_noise,
        file=arguments.out / JOURNAL if arguments.resume else None,
    )
    record, table, picture = (arguments.out / name for name in FILES)
    life.to_json(record)
    life.to_csv(table)
    written = [record, table]
    try:
        life.plot(picture, arguments.metric.partition(":")[2])
        written.append(picture)
    except ModuleNotFoundError as error:
        print(f"no picture: {error}", file=sys.stderr)
    if arguments.html:
        page = arguments.out / "life.html"
        life.to_html(page, arguments.metric.partition(":")[2])
        written.append(page)
    print(life)
    print(f"\nWritten to {arguments.out.resolve()}: {', '.join(path.name for path in written)}")


def _named(text: str) -> Any:
    """What ``package.module:name`` names; the current folder's modules are found, too."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CommandError(f"{text}: expected package.module:name ({error})") from error
