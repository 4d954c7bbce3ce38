"""What ONNX export costs, and what its files cost: ``python tools/bench_onnx.py [SUITE ...]``.

Suites: ``sizes`` (bytes of a file by weight bits), ``latency`` (ONNX Runtime on the CPU, every
level beside the digital model's export), ``memory`` (time and peak memory of an export by model
size), and, only if it is named, ``ties`` (how many outputs of sites lie at an ADC's tie, in all
cases of the tests' matrix). One row a figure is appended to ``tools/bench_onnx_rows.jsonl``; the
method is described in ``docs/onnx/benchmark.md``, whose figures ``python tools/bench_onnx.py
--table`` writes.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from bench_devices import cpu_model, installed
from bench_rows import append_rows, commit
from tables import markdown, with_section
from torch import Tensor, nn
from tqdm import tqdm

import analogfx
from analogfx import TorchInferenceRPUConfig, WeightQuantizationType
from analogfx.onnx.arguments import dynamic_axes
from analogfx.onnx.levels import LEVELS

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "tools" / "bench_onnx_rows.jsonl"
PAGE = ROOT / "docs" / "onnx" / "benchmark.md"
COMMAND = "python tools/bench_onnx.py --table"
PACKAGES = ("analogfx", "torch", "onnx", "onnxscript", "onnxruntime", "transformers")
REPEATS = 30
THREADS = 1
"""Of a call of ONNX Runtime: more of them wait for each other when a machine has other work."""

Row = dict[str, Any]

# ------------------------------------------------------------------------------------- models


def config(states: float = 0.0) -> TorchInferenceRPUConfig:
    """The recipe of the Analog Foundation Models, with weights of so many states."""
    made = analogfx.recipes.afm()
    if states:
        made.modifier.quantization_type = WeightQuantizationType.DISCRETIZE_PER_CHANNEL
        made.modifier.res = states
    return made


def llama(width: int, layers: int, vocabulary: int = 32000) -> nn.Module:
    """A Llama from a config, with random weights."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=max(width // 256, 1),
            use_cache=False,
        )
    ).eval()


def resnet() -> nn.Module:
    """ResNet-18 from a config, with random weights."""
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
        )
    ).eval()


def tokens(batch: int, length: int) -> Tensor:
    """Token ids that every model here knows."""
    return torch.randint(0, 1000, (batch, length))


def calibrated(model: nn.Module, rpu_config: TorchInferenceRPUConfig, x: Tensor) -> nn.Module:
    """The analog model with ranges from one batch."""
    analog = analogfx.analogize(model, rpu_config)
    with torch.no_grad():
        analog.train()(x)
    return analog.eval()


# ------------------------------------------------------------------------------------- suites


def sizes(folder: Path) -> Iterator[Row]:
    """Bytes of one model's file by the bits of its weights."""
    torch.manual_seed(0)
    model, x = llama(256, 4, vocabulary=1000), tokens(2, 16)
    for name, states in (("float32", 0), ("int8", 254), ("int4", 14)):
        path = folder / f"{name}.onnx"
        analogfx.export_onnx(calibrated(model, config(states), x), (x,), path, opset=21)
        parameters = sum(p.numel() for p in model.parameters())
        yield {"suite": "sizes", "weights": name, "bytes": path.stat().st_size,
               "parameters": parameters}  # fmt: skip


def latency(folder: Path) -> Iterator[Row]:
    """ONNX Runtime on every level and on the digital model, in turns."""
    torch.manual_seed(0)
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "Llama, 4 layers of 512, 128 tokens": (llama(512, 4, vocabulary=1000), tokens(1, 128)),
        "ResNet-18, 1 image of 224": (resnet(), torch.randn(1, 3, 224, 224)),
    }
    for name, (model, x) in cases.items():
        torch.onnx.export(
            model,
            (torch.cat([x, x]),),  # a free axis cannot be traced at 1
            folder / "digital.onnx",
            dynamo=True,
            dynamic_shapes=dynamic_axes((x,)),
            verbose=False,
            external_data=False,
        )
        analog = calibrated(model, config(254), x)
        for level in LEVELS:
            analogfx.export_onnx(analog, (x,), folder / f"{level}.onnx", level=level)
        sessions = {arm: _session(folder / f"{arm}.onnx") for arm in ("digital", *LEVELS)}
        times = _race(sessions, x)
        for arm, samples in times.items():
            low, *_, high = statistics.quantiles(samples, n=5)
            yield {
                "suite": "latency",
                "model": name,
                "arm": arm,
                "ms": round(1e3 * statistics.median(samples), 3),
                "least": round(1e3 * min(samples), 3),
                "p20": round(1e3 * low, 3),
                "p80": round(1e3 * high, 3),
                "over_digital": _ratio(statistics.median, samples, times["digital"]),
                "least_over_digital": _ratio(min, samples, times["digital"]),
                "threads": THREADS,
            }


def _ratio(
    figure: Callable[[list[float]], float], samples: list[float], digital: list[float]
) -> float:
    return round(figure(samples) / figure(digital), 3)


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = THREADS
    return onnxruntime.InferenceSession(str(path), options)


def _race(sessions: dict[str, onnxruntime.InferenceSession], x: Tensor) -> dict[str, list[float]]:
    """Seconds of every call; the arms take turns in an order drawn anew for each round."""
    times: dict[str, list[float]] = {arm: [] for arm in sessions}
    for turn in tqdm(range(REPEATS + 3), desc="latency", leave=False, mininterval=5):
        for arm in random.sample(list(sessions), len(sessions)):
            session = sessions[arm]
            feed = {session.get_inputs()[0].name: x.numpy()}
            start = time.perf_counter()
            session.run(None, feed)
            if turn >= 3:
                times[arm].append(time.perf_counter() - start)
    return times


def memory(folder: Path) -> Iterator[Row]:
    """Time and peak memory of exports, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    floats = [(width, layers, 0, "fused") for width, layers in ((1024, 4), (1024, 16), (2048, 14))]
    codes = [(1024, 16, 14, "fused"), (1024, 16, 254, "qdq")]
    for case in (*floats, *codes):
        for verify in (False, True):
            with context.Pool(1) as pool:
                yield pool.apply(_export_once, (folder, *case, verify))


def _export_once(
    folder: Path, width: int, layers: int, states: int, level: str, verify: bool
) -> Row:
    analog = analogfx.analogize(llama(width, layers), config(states), inplace=True).eval()
    weights = sum(p.numel() * p.element_size() for p in analog.parameters())
    before, start = _resident(), time.perf_counter()
    with _Peak() as peak:
        path = folder / "large.onnx"
        analogfx.export_onnx(analog, (tokens(2, 8),), path, level=level, opset=21, verify=verify)
    return {
        "suite": "memory",
        "parameters": sum(p.numel() for p in analog.parameters()),
        "weight_bytes": weights,
        "states": states,
        "level": level,
        "verify": verify,
        "seconds": round(time.perf_counter() - start, 1),
        "extra_bytes": peak.bytes - before,
        "extra_over_weights": round((peak.bytes - before) / weights, 3),
    }


def _resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Peak:
    """Watches the memory of this process from another thread."""

    def __enter__(self) -> "_Peak":
        self.bytes = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, _resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def ties(folder: Path) -> Iterator[Row]:
    """What the tests' matrix counts: every config on every model at every level."""
    sys.path.insert(0, str(ROOT / "tests"))
    import onnx_cases
    import onnx_compare

    found = {level: onnx_compare.Found() for level in LEVELS}
    for case in tqdm(onnx_cases.matrix(), desc="ties", leave=False, mininterval=5):
        found[case.level] += case.check(folder, verify=False)
    for level, counts in found.items():
        yield {"suite": "ties", "level": level, **vars(counts)}


SUITES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "sizes": sizes,
    "latency": latency,
    "memory": memory,
    "ties": ties,
}
BY_DEFAULT = ("sizes", "latency", "memory")


# ------------------------------------------------------------------------------------- tables

GOALS = {"fused": 1.5, "qdq": 1.0}
"""Largest latency over the digital model's, by level."""

EXTRA = 1.3
"""Largest extra memory of the largest model's export over its weights."""


def tables(recorded: list[Row]) -> str:
    """The last run of every suite as Markdown, with the goals."""
    parts = []
    for name, table in TABLES.items():
        rows = [row for row in recorded if row["suite"] == name]
        if not rows:
            raise SystemExit(f"{ROWS.name} has no rows of {name}: run tools/bench_onnx.py {name}")
        run = last_run(rows)
        parts += [f"**{name}**: {described(run[0])}", table(run)]
    return "\n\n".join(parts)


def last_run(rows: list[Row]) -> list[Row]:
    """The last row of every figure, all of one run: what was measured before is left out."""
    subjects = [tuple(row.get(key) for key in KEYS) for row in rows]
    first = max(n for n, subject in enumerate(subjects) if subject == subjects[0])
    run = rows[first:]
    if set(subjects[first:]) != set(subjects):
        raise SystemExit(f"the last run of {rows[0]['suite']} was broken off: run it again")
    return run


KEYS = ("weights", "model", "arm", "parameters", "states", "level", "verify")
"""What tells the figures of a suite apart."""


def described(row: Row) -> str:
    """Where and with what a run was made."""
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    return f"{row['date']}, commit {row['commit']}: {row['cpu']}, {row['cores']} cores; {versions}."


def size_table(rows: list[Row]) -> str:
    """Bytes by weight bits."""
    whole = rows[0]["bytes"]
    lines = [[r["weights"], f"{r['bytes']:,}", f"{r['bytes'] / whole:.2f}"] for r in rows]
    header = ["weights", f"bytes, {rows[0]['parameters']:,} parameters", "over float32"]
    return markdown(header, lines)


def latency_table(rows: list[Row]) -> str:
    """Milliseconds of every level, and whether its goal was reached."""
    lines = []
    for r in rows:
        most = GOALS.get(r["arm"])
        reached = "" if most is None else "reached" if r["over_digital"] <= most else "**missed**"
        goal = "" if most is None else f"≤ {most:g}: {reached}"
        times = f"{r['ms']:.1f} ({r['p20']:.1f}–{r['p80']:.1f})"
        ratios = f"{r['over_digital']:.2f}", f"{r['least_over_digital']:.2f}"
        lines.append([r["model"], r["arm"], times, f"{r['least']:.1f}", *ratios, goal])
    header = ["model", "file", "ms, median", "least", "median over digital", "least over digital"]
    return markdown([*header, "goal"], lines)


def memory_table(rows: list[Row]) -> str:
    """Seconds and extra memory by model size; the goal is for the largest model."""
    largest = max(r["parameters"] for r in rows)
    lines = []
    for r in rows:
        verdict = "reached" if r["extra_over_weights"] <= EXTRA else "**missed**"
        goal = f"≤ {EXTRA}: {verdict}" if r["parameters"] == largest else ""
        size = f"{r['parameters']:,}", f"{r['weight_bytes'] / 2**30:.2f} GiB"
        file = f"{r['level']}, {r['states'] or 'no'} states"
        verify = "yes" if r["verify"] else "no"
        extra = f"{r['extra_over_weights']:.2f}"
        lines.append([*size, file, verify, f"{r['seconds']:.1f}", extra, goal])
    header = ["parameters", "weights", "file", "verified", "seconds", "extra memory over weights"]
    return markdown([*header, "goal"], lines)


def tie_table(rows: list[Row]) -> str:
    """Outputs of sites by level."""
    lines = [[r["level"], f"{r['values']:,}", f"{r['at_ties']:,}", f"{r['apart']:,}"] for r in rows]
    return markdown(["level", "outputs of sites", "at a tie", "of these a step apart"], lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "sizes": size_table,
    "latency": latency_table,
    "memory": memory_table,
    "ties": tie_table,
}


# --------------------------------------------------------------------------------------- main


def measure(name: str, path: Path) -> None:
    """Run a suite and append its rows, all of them or none."""
    environment = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {package: installed(package) for package in PACKAGES},
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for row in SUITES[name](Path(folder)):
            print(row, flush=True)
            rows.append({**row, **environment})
    append_rows(path, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the suites asked for, or write the recorded figures to their page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=list(BY_DEFAULT), metavar="SUITE")
    parser.add_argument("--table", action="store_true", help=f"write the last run to {PAGE.name}")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.suites) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    if arguments.table:
        lines = ROWS.read_text().splitlines() if ROWS.exists() else []
        text = tables([json.loads(line) for line in lines])
        PAGE.write_text(with_section(PAGE.read_text(), COMMAND, text))
        return
    for name in arguments.suites:
        measure(name, ROWS)


if __name__ == "__main__":
    main()
