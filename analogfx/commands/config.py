"""The subcommand ``analogfx config``: make, check and compare config files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import nn

from analogfx import imports
from analogfx.choose import choose
from analogfx.commands.common import CommandError
from analogfx.commands.config_file import RECIPES, flat, read_config
from analogfx.config import as_config, doubts
from analogfx.errors import AnalogfxError
from analogfx.tables import table


class Different(AnalogfxError):
    """Two configs that are not the same."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to a parser's."""
    text = "Make, check and compare config files."
    parser = commands.add_parser("config", help=text, description=text)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    known = f"a JSON file, or {', '.join(RECIPES)}"

    init = actions.add_parser("init", help="print a recipe as a config file to change")
    init.add_argument("--recipe", choices=RECIPES, default="plain", help="default: plain")
    init.add_argument("--out", type=Path, metavar="FILE", help="write it there; must not exist")
    init.set_defaults(run=_init)

    check = actions.add_parser("check", help="say whether a config can run")
    check.add_argument("config", help=known)
    check.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="function that returns a digital model, to check a mapping's patterns with",
    )
    check.set_defaults(run=_check)

    diff = actions.add_parser(
        "diff", help="list the fields in which two configs differ; exit status 2 if there are any"
    )
    diff.add_argument("first", help=known)
    diff.add_argument("second", help=known)
    diff.set_defaults(run=_diff)


def _init(arguments: argparse.Namespace) -> None:
    text = RECIPES[arguments.recipe]().to_json()
    if arguments.out is None:
        print(text)
        return
    with arguments.out.open("x", encoding="utf-8") as stream:
        stream.write(text + "\n")
    print(f"Written to {arguments.out.resolve()}")


def _check(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config)
    each = [config] if not _is_mapping(config) else [c for c in config.values() if c is not None]
    for sentence in dict.fromkeys(s for one in each for s in doubts(as_config(one))):
        print(f"doubtful: {sentence}")
    if arguments.model is not None:
        model = imports.call("--model", arguments.model, CommandError)
        if not isinstance(model, nn.Module):
            raise CommandError(f"--model {arguments.model} returned a {type(model).__name__}")
        chosen = choose(model, config)
        print(f"{sum(c.config is not None for c in chosen.values())} of {len(chosen)} modules")
    print(f"{arguments.config}: can run")


def _is_mapping(config: Any) -> bool:
    return isinstance(config, dict) and any(":" in name for name in flat(config))


def _diff(arguments: argparse.Namespace) -> None:
    first, second = (flat(read_config(name)) for name in (arguments.first, arguments.second))
    rows = [
        (name, _shown(first, name), _shown(second, name))
        for name in {**first, **second}
        if (name in first, first.get(name)) != (name in second, second.get(name))
    ]
    if not rows:
        print("the same")
        return
    print("\n".join(table(("field", arguments.first, arguments.second), rows)))
    raise Different(f"{len(rows)} fields differ")


def _shown(fields: dict[str, Any], name: str) -> str:
    return json.dumps(fields[name]) if name in fields else "-"
