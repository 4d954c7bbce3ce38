"""The subcommands ``analogfx export`` and ``analogfx inspect``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from analogfx import imports
from analogfx.checkpoint import CONFIG_FILE, load
from analogfx.errors import OnnxError
from analogfx.onnx import export_onnx, load_onnx_sites
from analogfx.onnx.levels import LEVELS


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both subcommands to a parser's."""
    _add_export(commands)
    _add_inspect(commands)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "Write an analog model as an ONNX file that stock ONNX Runtime runs."
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="function that returns the digital model, of a module that is installed or in the "
        "current folder; not needed if the checkpoint folder has the config.json of a "
        "transformers model",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="what analogfx.save() wrote"
    )
    parser.add_argument(
        "--input",
        type=_shape,
        action="append",
        required=True,
        metavar="SHAPE",
        help="shape of an input, such as 1,3,32,32, or i:1,16 for token ids (zeros and ones), or "
        "m:1,16 for a mask (ones); once for each input, in forward's order",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the ONNX file")
    parser.add_argument("--level", choices=LEVELS, default="fused", help="default: fused")
    parser.add_argument("--opset", type=int, default=18, metavar="N", help="default: 18")
    parser.add_argument("--static", action="store_true", help="fix batch and sequence")
    parser.add_argument("--noise", action="store_true", help="add the config's training noise")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise")
    parser.add_argument("--no-verify", action="store_true", help="do not run the file")
    parser.add_argument(
        "--golden",
        type=int,
        default=0,
        metavar="N",
        help="write the codes of N calls beside the file, for a toolchain to check itself",
    )
    parser.add_argument(
        "--cache",
        action="store_true",
        help="a causal language model takes and returns keys and values of its attention",
    )
    parser.set_defaults(run=_run_export)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "List the analog sites of an ONNX file."
    parser = commands.add_parser("inspect", help=text, description=text)
    parser.add_argument("file", type=Path, metavar="FILE", help="what export wrote")
    parser.add_argument("--json", action="store_true", help="the record of the sites as JSON")
    parser.set_defaults(run=_run_inspect)


_KINDS: dict[str, Callable[[list[int]], Tensor]] = {
    "": torch.randn,
    "i": lambda shape: torch.randint(0, 2, shape),
    "m": lambda shape: torch.ones(shape, dtype=torch.int64),
}
"""What stands before a shape: nothing for normal values, i for token ids, m for a mask."""


def _shape(text: str) -> Callable[[], Tensor]:
    """Makes an input of a kind and a shape."""
    kind, _, sizes = text.rpartition(":")
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if kind not in _KINDS or not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"{text}: expected sizes such as 1,3,32,32, or i:1,16, or m:1,16"
        )
    return lambda: _KINDS[kind](shape)


def _run_export(arguments: argparse.Namespace) -> None:
    digital = _factory(arguments.model) if arguments.model else _transformers(arguments.checkpoint)
    analog = load(digital, arguments.checkpoint, inplace=True)
    torch.manual_seed(0)
    export_onnx(
        analog,
        tuple(make() for make in arguments.input),
        arguments.out,
        level=arguments.level,
        opset=arguments.opset,
        dynamic_shapes=not arguments.static,
        noise=arguments.noise,
        seed=arguments.seed,
        verify=not arguments.no_verify,
        golden=arguments.golden,
        cache=arguments.cache,
    )
    print(load_onnx_sites(arguments.out))
    print(f"\nWritten to {arguments.out.resolve()}")


def _run_inspect(arguments: argparse.Namespace) -> None:
    found = load_onnx_sites(arguments.file)
    print(found.to_json() if arguments.json else found)


def _factory(name: str) -> nn.Module:
    """The model that ``package.module:factory`` returns."""
    model = imports.call("--model", name, OnnxError)
    if not isinstance(model, nn.Module):
        raise OnnxError(f"--model {name} returned a {type(model).__name__}, not an nn.Module")
    return model


def _transformers(folder: Path) -> nn.Module:
    """The model, without weights worth anything, that a transformers config.json describes."""
    if not (folder / "config.json").is_file():
        raise OnnxError(
            f"{folder} has no config.json beside {CONFIG_FILE}: name the model with "
            "--model package.module:factory"
        )
    try:
        import transformers
    except ImportError as error:
        raise OnnxError(f"{folder} is a transformers model: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise OnnxError(f"{folder}/config.json: {str(error).splitlines()[0]}") from error
    config.use_cache = False  # a cache is no tensor
    if not config.architectures:
        raise OnnxError(
            f"{folder}/config.json: it names no architecture, as a model's save_pretrained() does: "
            "name the model with --model package.module:factory"
        )
    name = config.architectures[0]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise OnnxError(f"{folder}/config.json: transformers has no {name!r}")
    return architecture(config)
