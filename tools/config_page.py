"""Writes the page of all config fields and its picture: ``python tools/config_page.py``.

Meanings and defaults come from ``analogfx/config.py``, so that the page says what the code says.
"""

import ast
import inspect
import sys
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from analogfx import config

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tables import markdown, with_section

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURE = DOCS / "config.md", DOCS / "images" / "tile.png"
COMMAND = "python tools/config_page.py"

STEPS = {
    "forward.inp": "DAC",
    "forward.out_noise": "output noise",
    "forward.out": "ADC",
    "clip": "weights",
    "modifier": "weights",
    "mapping": "tile grid",
    "mapping.experts": "input range",
    "pre_post.input_range": "input range",
    "noise_model": "chip",
    "drift_compensation": "chip",
}
"""Which step of a tile a field acts on, by the longest beginning of its path."""

FRACTION, WEIGHT = "steps, or a fraction of the range", "input range × largest weight"
UNITS = {
    "forward.inp_res": FRACTION,
    "forward.out_noise": WEIGHT,
    "forward.out_bound": WEIGHT,
    "forward.out_res": FRACTION,
    "clip.sigma": "standard deviations of the weights",
    "modifier.std_dev": "largest weight",
    "modifier.res": FRACTION,
    "mapping.max_input_size": "rows",
    "mapping.max_output_size": "columns",
    "pre_post.input_range.act_range_momentum": "share of the old value",
    "pre_post.input_range.init_value": "that of the inputs",
    "pre_post.input_range.init_from_data": "training forwards",
    "pre_post.input_range.init_std_alpha": "standard deviations of the inputs",
    "pre_post.input_range.decay": "share of the range",
    "pre_post.input_range.input_min_percentage": "share of the inputs",
}
"""What a number is a multiple of."""


def documented(cls: type) -> dict[str, str]:
    """The first paragraph under each field, or enumeration value, of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    found = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            text = after.value.value if _is_text(after) else ""
            found[target.id] = " ".join(text.split("\n\n")[0].split()).replace("``", "`")
    return found


def _is_text(node: ast.AST | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def rows(cls: type = config.TorchInferenceRPUConfig, path: str = "") -> list[list[str]]:
    """A row for each field: its path, default, unit, step and meaning."""
    found = []
    meanings = documented(cls)
    for item in fields(cls):
        name = f"{path}{item.name}"
        factory = item.default_factory
        if factory is not MISSING and is_dataclass(factory):
            found += rows(factory, f"{name}.")
            continue
        step = STEPS[max(filter(name.startswith, STEPS), key=len)]
        default = item.default.name if isinstance(item.default, Enum) else repr(item.default)
        meaning = meanings[item.name]
        if not meaning:
            choices = documented(type(item.default))
            listed = (f"`{key}`: {text}" if text else f"`{key}`" for key, text in choices.items())
            meaning = " ".join(listed)
        found.append([f"`{name}`", f"`{default}`", UNITS.get(name, ""), step, meaning])
    return found


def draw(path: Path) -> None:
    """Draw the steps of a tile in the order in which an input passes them."""
    steps = [
        ("input range", "clip to ± range", "pre_post.input_range"),
        ("DAC", "round to inp_res steps", "forward.inp_res"),
        ("tile", "weights: clip, quantise,\nadd noise; multiply", "clip, modifier\nnoise_model"),
        ("output noise", "add", "forward.out_noise"),
        ("ADC", "round to out_res steps,\nclip to ± bound", "forward.out_res\nforward.out_bound"),
        ("digital", "compensate drift,\nsum tiles, add bias", "drift_compensation\nmapping"),
    ]
    figure = Figure(figsize=(11, 2.3), layout="constrained")
    axes = figure.subplots()
    for i, (title, what, names) in enumerate(steps):
        analog = title in ("tile", "output noise")
        face = "#dbe9f6" if analog else "#f4f4f4"
        box = FancyBboxPatch((2 * i, 0), 1.66, 1.25, boxstyle="round,pad=0.04", fc=face, ec="0.35")
        axes.add_patch(box)
        axes.text(2 * i + 0.83, 1.02, title, ha="center", va="center", weight="bold")
        axes.text(2 * i + 0.83, 0.45, what, ha="center", va="center", fontsize=7.5)
        axes.text(
            2 * i + 0.83, -0.2, names, ha="center", va="top", fontsize=7.5, family="monospace"
        )
        ends = {"xy": (2 * i - 0.06, 0.62), "xytext": (2 * i - 0.28, 0.62)}
        axes.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": "0.35"})
    axes.set_xlim(-0.4, 2 * len(steps) - 0.2)
    axes.set_ylim(-0.75, 1.45)
    axes.axis("off")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Write the table into the page, and the picture."""
    header = ["field", "default", "unit", "step", "meaning"]
    page = with_section(PAGE.read_text(encoding="utf-8"), COMMAND, markdown(header, rows()))
    PAGE.write_text(page, encoding="utf-8")
    draw(PICTURE)


if __name__ == "__main__":
    main()
