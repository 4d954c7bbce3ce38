"""Rows of figures: how they are made, kept and shown."""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_devices import Device, Row, cpu_model, installed
from roofline import Shape
from tables import markdown

ROOT = Path(__file__).resolve().parent.parent
DIGITAL, RECURRENT, EXPERTS = "nn.Linear", "nn.LSTM", "digital experts"
DIGITAL_ARMS = (DIGITAL, RECURRENT, EXPERTS)


class Contender(NamedTuple):
    """An arm with a number of tiles along the inputs; a digital layer has none."""

    arm: str
    tiles: int

    def __str__(self) -> str:
        return f"{self.arm}, {self.tiles} tile{'s' * (self.tiles > 1)}" if self.tiles else self.arm


class Sequences(NamedTuple):
    """Inputs of an LSTM: so many rows in each time step."""

    rows: int
    inputs: int
    outputs: int
    steps: int

    def __str__(self) -> str:
        return f"{self.steps} steps of {self.rows} rows, {self.inputs} → {self.outputs}"


class Routed(NamedTuple):
    """Rows of which every one goes to two of a block's experts: inputs → outputs → inputs."""

    rows: int
    inputs: int
    outputs: int
    experts: int

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{rows} to 2 of {self.experts} experts, {self.inputs} → {self.outputs}"


AnyShape = Shape | Sequences | Routed


class Goal(NamedTuple):
    """A bound on a contender's figure, or on its ratio to another's."""

    what: str
    contender: Contender
    over: Contender | None
    at_most: float

    def __str__(self) -> str:
        over = f" × {self.over}" if self.over else ""
        return f"{self.what}: {self.contender} ≤ {self.at_most}{over}"


# ------------------------------------------------------------------------------------- making


def timed_rows(
    what: str, shape: AnyShape, contenders: Iterable[Contender], times: list[list[float]]
) -> list[Row]:
    """Rows of one race, with ratios to the digital layer's median in it."""
    rows = [
        make_row(what, shape, contender, "ms", samples)
        for contender, samples in zip(contenders, times, strict=True)
    ]
    digital = next(row["median"] for row in rows if not row["tiles"])
    return [row | {"ratio": round(row["median"] / digital, 3)} for row in rows]


def make_row(
    what: str, shape: AnyShape, contender: Contender, unit: str, samples: Sequence[float]
) -> Row:
    """One figure: median and the 20th and 80th percentile of its samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return _row(what, shape, contender, unit) | {
        "median": round(statistics.median(ordered), 4),
        "p20": round(ordered[round(0.2 * last)], 4),
        "p80": round(ordered[round(0.8 * last)], 4),
        "repeats": len(ordered),
    }


def failed_row(what: str, shape: AnyShape, contender: Contender, unit: str, reason: str) -> Row:
    """A figure that could not be taken."""
    return _row(what, shape, contender, unit) | {"failed": reason}


def _row(what: str, shape: AnyShape, contender: Contender, unit: str) -> Row:
    return {"what": what, "unit": unit, **shape._asdict(), **contender._asdict()}


def environment(device: Device) -> Row:
    """What a figure depends on besides the code that is timed; the same for a whole run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("analogfx", "torch", "aihwkit-lightning")},
        "device": device.name,
        **device.described(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(device.dtype).removeprefix("torch."),
        "config": "afm",
    }


def commit() -> str | None:
    """The commit of the checkout, "-dirty" if files differ from it; None outside git.

    What runs leave, rows and the pages that are made of them, is no difference.
    """
    left = (":!tools/*_rows.jsonl", ":!docs")
    commands = (
        ["git", "describe", "--always", "--exclude=*"],
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *left],
    )
    try:
        name, changed = (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
            for command in commands
        )
    except FileNotFoundError:
        return None
    return f"{name}-dirty" if name and changed else name or None


# ------------------------------------------------------------------------------------ keeping


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to the data file, one JSON object a line."""
    with path.open("a") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def latest_rows(path: Path, device: str) -> list[Row]:
    """The rows of a device's last recorded run."""
    if not path.exists():
        return []
    recorded = map(json.loads, path.read_text().splitlines())
    rows = [row for row in recorded if row["device"] == device]
    return [row for row in rows if row["date"] == rows[-1]["date"]]


# ------------------------------------------------------------------------------------ showing

SHOWN = {
    "ms": "{:.2f}",
    "bytes": "{:,.0f}",
    "ATen ops": "{:.0f}",
    "%": "{:.1f}",
    "MB": "{:,.1f}",
    "syncs": "{:.0f}",
}
FINE = "{:.3f}"
"""Figures below a millisecond."""


def tables(rows: list[Row], goals: Iterable[Goal]) -> str:
    """A run as Markdown: how it was made, a table for each figure, and the goals."""
    if not rows:
        return "No run is recorded yet."
    figures = dict.fromkeys(row["what"] for row in rows)
    parts = [figure_table([row for row in rows if row["what"] == what]) for what in figures]
    return "\n\n".join([described(rows[0]), *parts, goal_table(rows, goals)])


def described(row: Row) -> str:
    """Where and with what a run was made."""
    gpu = ""
    if "gpu" in row:
        gpu = f"{row['gpu']}, driver {row['driver']}, CUDA {row['cuda']}, triton {row['triton']}; "
    return (
        f"{row['date'][:10]}, commit {row['commit']}: {gpu}{row['cpu']}, {row['cores']} cores, "
        f"{row['threads']} threads, {row['dtype']}, config `{row['config']}`; "
        f"analogfx {row['analogfx']}, aihwkit-lightning {row['aihwkit-lightning']}, "
        f"torch {row['torch']}, Python {row['python']}."
    )


def figure_table(rows: list[Row]) -> str:
    """One figure of all contenders: a line for each shape; below it, why some have none."""
    contenders = list(dict.fromkeys(contender_of(row) for row in rows))
    cells = {(shape_of(row), contender_of(row)): cell(row) for row in rows}
    lines = [
        [str(shape), *(cells.get((shape, contender), "fails") for contender in contenders)]
        for shape in dict.fromkeys(map(shape_of, rows))
    ]
    title = f"**{rows[0]['what']}**, {rows[0]['unit']}"
    table = f"{title}\n\n{markdown(['layer', *map(str, contenders)], lines)}"
    failed = dict.fromkeys(
        f"{contender_of(row)} fails: {row['failed']}" for row in rows if "failed" in row
    )
    return "\n".join([table, *(f"\n{line}" for line in failed)])


def cell(row: Row) -> str:
    """A figure; for a time also its 20th and 80th percentile, and its ratio to the digital one."""
    if "failed" in row:
        return "fails"
    shown = FINE if row["unit"] == "ms" and row["median"] < 1 else SHOWN[row["unit"]]
    median, p20, p80 = (shown.format(row[name]) for name in ("median", "p20", "p80"))
    return f"{median} ({p20}–{p80}) ×{row['ratio']:.2f}" if "ratio" in row else median


def goal_table(rows: list[Row], goals: Iterable[Goal]) -> str:
    """Every goal with what each shape reached."""
    medians = {(row["what"], shape_of(row), contender_of(row)): row.get("median") for row in rows}
    shapes = list(dict.fromkeys(shape_of(row) for row in rows))
    lines = []
    for goal in goals:
        reached = [
            _ratio(
                medians.get((goal.what, shape, goal.contender)),
                medians.get((goal.what, shape, goal.over)) if goal.over else 1.0,
            )
            for shape in shapes
        ]
        lines.append([str(goal), *(verdict(value, goal) for value in reached)])
    return markdown(["goal", *map(str, shapes)], lines)


def _ratio(figure: float | None, over: float | None) -> float | None:
    return None if figure is None or over is None else figure / over


def verdict(value: float | None, goal: Goal) -> str:
    """What was reached, and whether it is enough."""
    if value is None:
        return "not measured"
    return f"{value:.2f} {'reached' if value <= goal.at_most else '**missed**'}"


def shape_of(row: Row) -> AnyShape:
    """The shape that a row was measured with."""
    kind: Any = Sequences if "steps" in row else Routed if "experts" in row else Shape
    shape: AnyShape = kind(*(row[name] for name in kind._fields))
    return shape


def contender_of(row: Row) -> Contender:
    """The contender that a row is of."""
    return Contender(*(row[name] for name in Contender._fields))
