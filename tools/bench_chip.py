"""What a chip costs: ``python tools/bench_chip.py [--table]``.

For each noise model, on one layer: the time of reading a chip (``Device.at``), beside that of
drawing as many normal values with torch, and that of programming and reading the same weights with
AIHWKIT where it is installed; a forward inside ``at`` beside the same one outside; and the bytes
that a chip and a reading hold for each weight. Arms take turns, in an order drawn anew for each
round. One row a model is appended to ``tools/bench_chip_rows.jsonl``; ``--table`` writes the last
run to ``docs/benchmark.md``.
"""

import argparse
import importlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from bench_devices import Cpu, Row, installed
from bench_rows import ROOT, append_rows, environment
from tables import markdown, with_section
from torch import Tensor, nn

import analogfx
from analogfx import chip, held
from analogfx.chip.model import NoiseModel

ROWS = ROOT / "tools" / "bench_chip_rows.jsonl"
PAGE = ROOT / "docs" / "benchmark.md"
COMMAND = "python tools/bench_chip.py --table"
REPEATS = 15
SIZE, BATCH = 2048, 512
DAY = 86400.0

MODELS: Mapping[str, Callable[[], NoiseModel]] = {
    "PCMLikeNoiseModel": chip.PCMLikeNoiseModel,
    "HermesNoiseModel": chip.HermesNoiseModel,
    "StateIndependentNoiseModel": chip.StateIndependentNoiseModel,
    "ReRamWan2022NoiseModel": chip.ReRamWan2022NoiseModel,
    "FoundationNoiseModel": chip.FoundationNoiseModel,
}
GOALS = {"at": 6.0, "forward": 1.05, "bytes": 12.0}
"""Largest ratio of a reading to its draws, of a forward inside to one outside, bytes a weight."""


def normals(model: NoiseModel, weights: int) -> int:
    """How many normal values one reading of so many weights draws."""
    drawn = 0

    def draw(like: Tensor, name: str = "") -> Tensor:
        nonlocal drawn
        drawn += like.numel()
        return torch.zeros_like(like)

    devices = model.g_converter.devices
    target = torch.full((devices, 100), 5.0)
    model.at(model.programmed(target, draw), model.drift(target, draw), DAY, draw)
    return drawn * weights // 100


def peer(name: str, weight: Tensor) -> Callable[[], object] | None:
    """The same by AIHWKIT; None where it is not installed or has no such model."""
    if installed("aihwkit") is None:
        return None
    known = {
        "PCMLikeNoiseModel": "pcm",
        "StateIndependentNoiseModel": "custom",
        "ReRamWan2022NoiseModel": "reram",
        "HermesNoiseModel": "hermes",
    }
    if name not in known:
        return None
    module = importlib.import_module(f"aihwkit.inference.noise.{known[name]}")
    model = getattr(module, name)()

    def program_and_read() -> object:
        programmed, drift = model.apply_programming_noise(weight)
        return model.apply_drift_noise(programmed, drift, DAY)

    return program_and_read


def race(arms: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call of every arm."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(repeats + 2):
        for name in order.sample(list(arms), len(arms)):
            start = time.perf_counter()
            arms[name]()
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(
    models: Mapping[str, Callable[[], NoiseModel]], size: int, batch: int, repeats: int
) -> Iterator[Row]:
    """A row for every noise model."""
    torch.manual_seed(0)
    analog = analogfx.analogize(nn.Linear(size, size, bias=False), analogfx.recipes.afm()).eval()
    x = torch.randn(batch, size)
    analogfx.calibrate(analog, [x], progress=False)
    for name, make in models.items():
        model = make()
        device = analogfx.program(analog, model, chip.GlobalDriftCompensation(), seed=1)
        values = torch.empty(normals(model, size * size))
        arms: dict[str, Callable[[], object]] = {
            "at": partial(_read, device),
            "draws": values.normal_,
        }
        other = peer(name, analog.weight.detach())
        if other is not None:
            arms["aihwkit"] = other
        with device.at(DAY, read=0):
            now = held.of(analog._analog)
        assert now is not None
        holdings = {analog._analog.number: now}
        forwards: dict[str, Callable[[], object]] = {
            "outside": partial(analog, x),
            "inside": partial(_inside, holdings, analog, x),
        }
        with torch.no_grad():
            times = race(arms, repeats) | race(forwards, repeats)
        yield {
            "model": name,
            "size": size,
            "batch": batch,
            "repeats": repeats,
            "normals": values.numel(),
            **{arm: round(statistics.median(of), 3) for arm, of in times.items()},
            "bytes": round(_bytes(device, now) / size**2, 3),
        }


def _read(device: analogfx.Device) -> None:
    with device.at(DAY):
        pass


def _inside(holdings: held.Holdings, analog: nn.Module, x: Tensor) -> None:
    with held.holding(holdings):
        analog(x)


def _bytes(device: analogfx.Device, now: tuple[held.Held, ...]) -> int:
    """Of what a chip keeps, and of one reading."""
    parts = [part for one in (*device._sites, *now) for part in vars_of(one)]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def vars_of(one: Any) -> tuple[Any, ...]:
    """The fields of a named tuple or a dataclass."""
    return tuple(one) if isinstance(one, tuple) else tuple(vars(one).values())


def table(rows: list[Row]) -> str:
    """A run as Markdown."""
    if not rows:
        return "No run is recorded yet."
    first = rows[0]
    lines = []
    for row in rows:
        draws, forward = row["at"] / row["draws"], row["inside"] / row["outside"]
        lines.append(
            (
                f"`{row['model']}`",
                f"{row['normals'] / first['size'] ** 2:g}",
                f"{row['at']:.0f}",
                f"×{draws:.1f}{_verdict(draws, 'at')}",
                f"×{row['at'] / row['aihwkit']:.2f}" if "aihwkit" in row else "-",
                f"×{forward:.2f}{_verdict(forward, 'forward')}",
                f"{row['bytes']:.1f}{_verdict(row['bytes'], 'bytes')}",
            )
        )
    header = ("model", "normals a weight", "reading, ms", "of drawing them", "of AIHWKIT's",
              "forward inside, of outside", "bytes a weight")  # fmt: skip
    how = (
        f"{first['date'][:10]}, commit {first['commit']}: {first['cpu']}, {first['cores']} cores, "
        f"{first['threads']} threads, torch {first['torch']}; {first['size']} × {first['size']} "
        f"weights, {first['batch']} rows, medians of {first['repeats']}. Goals: a reading takes at "
        f"most {GOALS['at']:g} times its draws, a forward inside at most {GOALS['forward']} times "
        f"one outside, and a weight at most {GOALS['bytes']:g} bytes."
    )
    return f"{how}\n\n{markdown(header, lines)}"


def _verdict(value: float, goal: str) -> str:
    return "" if value <= GOALS[goal] else " **missed**"


def latest() -> list[Row]:
    """The rows of the last run."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return [row for row in rows if row["date"] == rows[-1]["date"]]


def bench(
    models: Mapping[str, Callable[[], NoiseModel]] = MODELS,
    size: int = SIZE,
    batch: int = BATCH,
    repeats: int = REPEATS,
) -> str:
    """Measure, append the rows to the data file, and show them."""
    device = Cpu()
    device.prepare()
    common = environment(device)
    rows = [common | row for row in measure(models, size, batch, repeats)]
    append_rows(ROWS, rows)
    return table(rows)


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="write the last run to benchmark.md")
    if parser.parse_args().table:
        PAGE.write_text(with_section(PAGE.read_text(), COMMAND, table(latest())))
    else:
        print(bench())


if __name__ == "__main__":
    main()
