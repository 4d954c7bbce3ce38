"""What an analog layer costs beside a digital one: ``python tools/bench.py --device cpu``.

Races ``nn.Linear``, analogfx and AIHWKIT-Lightning on the same weights, data and config, appends
one row a figure to ``tools/bench_rows.jsonl``, and prints the figures and the goals. The method is
described in ``docs/benchmark.md``, whose figures ``python tools/bench.py --table`` writes.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from aihwkit_lightning.nn.conversion import convert_to_analog
from aihwkit_lightning.optim import AnalogOptimizer
from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig as LightningConfig
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm import tqdm

import analogfx

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "tools" / "bench_rows.jsonl"
PAGE = ROOT / "docs" / "benchmark.md"
PARITY = tuple(f"tests/test_parity_{of}.py" for of in ("linear", "conv", "training"))

BEGIN, END = "<!-- python tools/bench.py --table -->", "<!-- end -->"

LEARNING_RATE = 1e-4
SATURATING_RANGE = 2.0
"""Cuts 4.6 % of standard normal inputs: about where the recipe's decay leaves a learned range."""

Row = dict[str, Any]

# --------------------------------------------------------------------------------------- arms


class Subject(NamedTuple):
    """One contender: a module, and the optimizer whose step does all that its tool does."""

    module: nn.Module
    optimizer: Optimizer


def linear_arm(layer: nn.Module, config: analogfx.TorchInferenceRPUConfig) -> Subject:
    """The digital layer as it is."""
    return Subject(layer, SGD(layer.parameters(), lr=LEARNING_RATE))


def analogfx_arm(layer: nn.Module, config: analogfx.TorchInferenceRPUConfig) -> Subject:
    """The layer made analog by analogfx, clipped after every step."""
    analog = analogfx.analogize(layer, config)
    optimizer = SGD(analog.parameters(), lr=LEARNING_RATE)
    analogfx.clip_after_step(optimizer, analog)
    return Subject(analog, optimizer)


def lightning_arm(layer: nn.Module, config: analogfx.TorchInferenceRPUConfig) -> Subject:
    """The layer made analog by AIHWKIT-Lightning, under its own optimizer, which clips."""
    analog = convert_to_analog(layer, lightning_config(config))
    optimizer = AnalogOptimizer(SGD, analog.analog_layers, analog.parameters(), lr=LEARNING_RATE)
    return Subject(analog, optimizer)


def lightning_config(config: analogfx.TorchInferenceRPUConfig) -> LightningConfig:
    """Lightning's config object with the values of ours."""
    target = LightningConfig()
    _copy_fields(config, target)
    return target


def _copy_fields(source: object, target: object) -> None:
    for name, old in vars(target).items():
        value = getattr(source, name)
        if isinstance(old, Enum):
            setattr(target, name, type(old)[value.name])
        elif hasattr(old, "__dict__"):
            _copy_fields(value, old)
        else:
            setattr(target, name, value)


DIGITAL = "nn.Linear"
ARMS = {DIGITAL: linear_arm, "analogfx": analogfx_arm, "lightning": lightning_arm}

# ------------------------------------------------------------------------------------- suites


class Shape(NamedTuple):
    """Rows of the input, and the layer."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.inputs} → {self.outputs}"


class Contender(NamedTuple):
    """An arm with a number of tiles along the inputs; a digital layer has none."""

    arm: str
    tiles: int

    def __str__(self) -> str:
        return f"{self.arm}, {self.tiles} tile{'s' * (self.tiles > 1)}" if self.tiles else self.arm


class Goal(NamedTuple):
    """A bound on the ratio of two contenders' figures."""

    what: str
    contender: Contender
    over: Contender
    at_most: float

    def __str__(self) -> str:
        return f"{self.what}: {self.contender} ≤ {self.at_most} × {self.over}"


LINEAR = Contender(DIGITAL, 0)
ONE, EIGHT = Contender("analogfx", 1), Contender("analogfx", 8)
PEER_ONE, PEER_EIGHT = Contender("lightning", 1), Contender("lightning", 8)


@dataclass(frozen=True)
class Suite:
    """What is raced on one kind of device."""

    shapes: tuple[Shape, ...]
    contenders: tuple[Contender, ...] = (LINEAR, ONE, EIGHT, PEER_ONE, PEER_EIGHT)
    repeats: int = 30
    warmup: int = 3
    goals: tuple[Goal, ...] = (
        Goal("forward", ONE, LINEAR, 1.15),
        Goal("forward", EIGHT, LINEAR, 1.15),
        Goal("step", ONE, LINEAR, 1.4),
        Goal("step", EIGHT, ONE, 1.3),
        Goal("step", ONE, PEER_ONE, 0.7),
        Goal("step", EIGHT, PEER_EIGHT, 0.7),
    )


SUITES = {
    "cpu": Suite(shapes=(Shape(512, 1024, 1024), Shape(512, 2048, 2048), Shape(64, 4096, 4096)))
}

# ------------------------------------------------------------------------------ what is timed


class Data(NamedTuple):
    """An input inside a network, so that its gradient is wanted, and the gradient that comes."""

    x: Tensor
    grad: Tensor


def make_data(shape: Shape) -> Data:
    """Standard normal input and output gradient."""
    x = torch.randn(shape.rows, shape.inputs, requires_grad=True)
    return Data(x, torch.randn(shape.rows, shape.outputs))


@torch.no_grad()
def forward(subject: Subject, data: Data) -> None:
    """Inference."""
    subject.module(data.x)


def step(subject: Subject, data: Data) -> None:
    """Forward, backward to weights, ranges and input, and the tool's whole optimizer step."""
    subject.optimizer.zero_grad()
    data.x.grad = None
    subject.module(data.x).backward(data.grad)
    subject.optimizer.step()


class Mode(NamedTuple):
    """A call to time, and the state of the layer in which it is timed."""

    call: Callable[[Subject, Data], None]
    training: bool = True
    closed: bool = True
    """Whether the input ranges have been set from data, the state of almost all of training."""
    input_range: float | None = None
    """Value of the ranges, None for the one that data gave."""


MODES = {
    "forward": Mode(forward, training=False),
    "step": Mode(step),
    "saturated step": Mode(step, input_range=SATURATING_RANGE),
    "initialisation step": Mode(step, closed=False),
}


def afm(shape: Shape, tiles: int) -> analogfx.TorchInferenceRPUConfig:
    """The recipe of the Analog Foundation Models, on a number of tiles."""
    config = analogfx.recipes.afm()
    if tiles > 1:
        config.mapping.max_input_size = -(-shape.inputs // tiles)
    return config


def make_subject(contender: Contender, shape: Shape, data: Data, mode: Mode) -> Subject:
    """A contender in the state that a mode asks for; all of them hold the same weights."""
    torch.manual_seed(0)
    config = afm(shape, contender.tiles)
    subject = ARMS[contender.arm](nn.Linear(shape.inputs, shape.outputs), config)
    subject.module(data.x)  # in training: the ranges see data
    if mode.closed:
        close_ranges(subject.module, config.pre_post.input_range.init_from_data, mode.input_range)
    subject.module.train(mode.training)
    return subject


@torch.no_grad()
def close_ranges(module: nn.Module, count: int, value: float | None) -> None:
    """End the initialisation of input ranges; both tools keep them under the same names."""
    for name, tensor in module.state_dict().items():  # tensors that share the module's storage
        if name.endswith("input_range_update_idx"):
            tensor.fill_(count)
        elif name.endswith("input_range") and value is not None:
            tensor.fill_(value)


# ------------------------------------------------------------------------------- measurements


def race(
    title: str, calls: Sequence[Callable[[], None]], repeats: int, warmup: int
) -> list[list[float]]:
    """Milliseconds of every call, all of them once a round, in an order drawn for each round."""
    times: list[list[float]] = [[] for _ in calls]
    order = random.Random(0)
    for number in tqdm(range(-warmup, repeats), desc=title, leave=False):
        for index in order.sample(range(len(calls)), len(calls)):
            start = time.perf_counter()
            calls[index]()
            elapsed = 1e3 * (time.perf_counter() - start)
            if number >= 0:
                times[index].append(elapsed)
    return times


def saved_bytes(subject: Subject, data: Data) -> int:
    """Bytes that a forward keeps for its backward, without the parameters and the input.

    Every storage counts once, however many tensors show it.
    """
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # alive, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject.module(data.x)
    for known in (data.x, *subject.module.parameters()):
        storages.pop(known.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def aten_ops(subject: Subject, data: Data) -> int:
    """ATen ops that a training forward calls, without those that ATen itself calls for them.

    The profiler sees inside analogfx's own ops, which a dispatch mode does not. It follows one
    thread, so there is only one meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            subject.module(data.x)
    finally:
        torch.set_num_threads(threads)
    events = profile.function_events
    return sum(_is_aten(event) and not _is_aten(event.cpu_parent) for event in events)


def _is_aten(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def measure(shape: Shape, suite: Suite) -> Iterator[Row]:
    """The rows of one shape."""
    for what, mode in MODES.items():
        torch.manual_seed(0)
        data = make_data(shape)
        subjects = {c: make_subject(c, shape, data, mode) for c in suite.contenders}
        calls = [partial(mode.call, subject, data) for subject in subjects.values()]
        times = race(f"{what}, {shape}", calls, suite.repeats, suite.warmup)
        yield from timed_rows(what, shape, suite.contenders, times)
        if what == "step":
            for contender, subject in subjects.items():
                yield from counted_rows(shape, contender, subject, data)


def counted_rows(shape: Shape, contender: Contender, subject: Subject, data: Data) -> Iterator[Row]:
    """Rows of what a training forward costs besides time; exact, and so counted once."""
    yield make_row("saved for backward", shape, contender, "bytes", [saved_bytes(subject, data)])
    yield make_row("training forward", shape, contender, "ATen ops", [aten_ops(subject, data)])


def timed_rows(
    what: str, shape: Shape, contenders: Iterable[Contender], times: list[list[float]]
) -> list[Row]:
    """Rows of one race, with ratios to the digital layer's median in it."""
    rows = [
        make_row(what, shape, contender, "ms", samples)
        for contender, samples in zip(contenders, times, strict=True)
    ]
    digital = next(row["median"] for row in rows if row["arm"] == DIGITAL)
    return [row | {"ratio": round(row["median"] / digital, 3)} for row in rows]


def make_row(what: str, shape: Shape, contender: Contender, unit: str, samples: list[float]) -> Row:
    """One figure: median and the 20th and 80th percentile of its samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "what": what,
        "unit": unit,
        **shape._asdict(),
        **contender._asdict(),
        "median": round(statistics.median(ordered), 4),
        "p20": round(ordered[round(0.2 * last)], 4),
        "p80": round(ordered[round(0.8 * last)], 4),
        "repeats": len(ordered),
    }


# ------------------------------------------------------------------------------------ records


def environment(device: str) -> Row:
    """What a figure depends on besides the code that is timed; the same for a whole run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("analogfx", "torch", "aihwkit-lightning")},
        "device": device,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "config": "afm",
    }


def commit() -> str | None:
    """The commit of the checkout, "-dirty" if files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def cpu_model() -> str:
    """The name that the processor gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


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


# ------------------------------------------------------------------------------------- tables

SHOWN = {"ms": "{:.2f}", "bytes": "{:,.0f}", "ATen ops": "{:.0f}"}


def tables(rows: list[Row], suite: Suite) -> str:
    """A run as Markdown: how it was made, a table for each figure, and the goals."""
    if not rows:
        return "No run is recorded yet."
    figures = dict.fromkeys(row["what"] for row in rows)
    parts = [figure_table([row for row in rows if row["what"] == what]) for what in figures]
    return "\n\n".join([described(rows[0]), *parts, goal_table(rows, suite.goals)])


def described(row: Row) -> str:
    """Where and with what a run was made."""
    return (
        f"{row['date'][:10]}, commit {row['commit']}: {row['cpu']}, {row['cores']} cores, "
        f"{row['threads']} threads, {row['dtype']}, config `{row['config']}`; "
        f"analogfx {row['analogfx']}, aihwkit-lightning {row['aihwkit-lightning']}, "
        f"torch {row['torch']}, Python {row['python']}."
    )


def figure_table(rows: list[Row]) -> str:
    """One figure of all contenders: a line for each shape."""
    contenders = list(dict.fromkeys(contender_of(row) for row in rows))
    lines = {shape_of(row): [str(shape_of(row))] for row in rows}
    for row in rows:
        lines[shape_of(row)].append(cell(row))
    title = f"**{rows[0]['what']}**, {rows[0]['unit']}"
    return f"{title}\n\n{markdown(['layer', *map(str, contenders)], lines.values())}"


def cell(row: Row) -> str:
    """A figure; for a time also its 20th and 80th percentile, and its ratio to the digital one."""
    shown = SHOWN[row["unit"]]
    median, p20, p80 = (shown.format(row[name]) for name in ("median", "p20", "p80"))
    return f"{median} ({p20}–{p80}) ×{row['ratio']:.2f}" if "ratio" in row else median


def goal_table(rows: list[Row], goals: Iterable[Goal]) -> str:
    """Every goal with the ratio that each shape reached."""
    medians = {(row["what"], shape_of(row), contender_of(row)): row["median"] for row in rows}
    shapes = list(dict.fromkeys(shape_of(row) for row in rows))
    lines = []
    for goal in goals:
        ratios = [
            medians[goal.what, shape, goal.contender] / medians[goal.what, shape, goal.over]
            for shape in shapes
        ]
        verdicts = (f"{r:.2f} {'reached' if r <= goal.at_most else '**missed**'}" for r in ratios)
        lines.append([str(goal), *verdicts])
    return markdown(["goal", *map(str, shapes)], lines)


def shape_of(row: Row) -> Shape:
    """The shape that a row was measured with."""
    return Shape(*(row[name] for name in Shape._fields))


def contender_of(row: Row) -> Contender:
    """The contender that a row is of."""
    return Contender(*(row[name] for name in Contender._fields))


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_tables(page: str, text: str) -> str:
    """A page whose generated section is replaced by a text."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


# --------------------------------------------------------------------------------------- main


def require_parity(*tests: str) -> None:
    """Refuse to go on unless analogfx computes what Lightning computes."""
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"bench: {', '.join(tests)} red; the speed of wrong numbers is not measured")


def bench(device: str, suite: Suite, path: Path) -> list[Row]:
    """Measure a suite and append its rows to a data file, all of them or none."""
    torch.set_num_threads(os.cpu_count() or 1)
    common = environment(device)
    rows = [common | row for shape in suite.shapes for row in measure(shape, suite)]
    append_rows(path, rows)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, or write the recorded figures to its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=SUITES, default="cpu")
    parser.add_argument("--table", action="store_true", help=f"write the last run to {PAGE.name}")
    args = parser.parse_args(argv)
    suite = SUITES[args.device]
    if args.table:
        text = tables(latest_rows(ROWS, args.device), suite)
        PAGE.write_text(with_tables(PAGE.read_text(), text))
    else:
        require_parity(*PARITY)
        print(tables(bench(args.device, suite, ROWS), suite))


if __name__ == "__main__":
    main()
