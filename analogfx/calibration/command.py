"""The subcommand ``analogfx calibrate``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from analogfx import imports
from analogfx.calibration import METHODS, calibrate
from analogfx.checkpoint import load, save
from analogfx.errors import CalibrationError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to a parser's."""
    text = "Set the input ranges of a saved analog model from data, and save it again."
    parser = commands.add_parser("calibrate", help=text, description=text)
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
    parser.add_argument(
        "--data",
        required=True,
        metavar="MODULE:FUNCTION",
        help=f"function that returns the batches (a DataLoader, a list, ...), {where}",
    )
    parser.add_argument("--method", choices=METHODS, default="quantile", help="default: quantile")
    parser.add_argument(
        "--quantile", type=float, default=0.99995, metavar="Q", help="default: 0.99995"
    )
    parser.add_argument(
        "--max-samples", type=int, default=1000, metavar="N", help="rows to keep (default: 1000)"
    )
    parser.add_argument(
        "--std-alpha", type=float, metavar="A", help="default: each config's init_std_alpha"
    )
    parser.add_argument("--adc", action="store_true", help="choose the bound of the ADCs, too")
    parser.add_argument(
        "--adc-clipped",
        type=float,
        default=1e-4,
        metavar="SHARE",
        help="largest share of outputs that the bound may clip (default: 0.0001)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the checkpoint goes"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    digital = imports.call("--model", arguments.model, CalibrationError)
    if not isinstance(digital, nn.Module):
        raise CalibrationError(
            f"--model {arguments.model} returned a {type(digital).__name__}, not an nn.Module"
        )
    analog = load(digital, arguments.checkpoint, inplace=True)
    batches = imports.call("--data", arguments.data, CalibrationError)
    if not isinstance(batches, Iterable):
        raise CalibrationError(
            f"--data {arguments.data} returned a {type(batches).__name__}, not batches"
        )
    result = calibrate(
        analog,
        batches,
        arguments.method,
        quantile=arguments.quantile,
        max_samples=arguments.max_samples,
        std_alpha=arguments.std_alpha,
        adc=arguments.adc,
        adc_clipped=arguments.adc_clipped,
        seed=arguments.seed,
    )
    save(analog, arguments.out)
    print(result)
    print(f"\nWritten to {arguments.out.resolve()}")
