"""What a first run on a GPU measures, one step in a process: ``python tools/gpu_steps.py STEP``.

``tools/gpu_run.py`` runs the steps in their order; a fault of the device ends one process and no
more. Every step prints its figures as lines of JSON. With ``--rehearse`` a step runs on the CPU, on
small tensors, with launches counted and not run.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import bench
import bench_layers
import roofline
import torch
from bench_devices import Cuda, Device, Row, driver, installed
from bench_layers import EIGHT, LIGHTNING, LINEAR, ONE, TRITON, Mode, Subject
from bench_rows import Routed
from roofline import Shape

import analogfx
from analogfx.kernels import dispatch
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.blocks import Blocks
from analogfx.kernels.triton.launch import Launch

SMALL = Shape(128, 512, 512)
"""Of a rehearsal, and of what a sanitizer watches."""

PACKAGES = ("torch", "triton", "numpy", "safetensors", "regex", "tqdm", "rich", "pytest",
            "hypothesis", "transformers", "onnx", "aihwkit-lightning")  # fmt: skip


class Stub:
    """Stands for ``torch.cuda`` on a machine without a GPU. Nothing takes any time on it."""

    class Event:
        """A moment."""

        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            """Now."""
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            """Nothing is queued."""

        def elapsed_time(self, end: Stub.Event) -> float:
            """Milliseconds."""
            return 1e3 * (end.at - self.at)

    def __getattr__(self, name: str) -> Callable[..., int]:
        """What else is asked for does nothing and finds nothing."""
        return lambda *args, **options: 0

    def get_device_name(self) -> str:
        """No GPU's."""
        return "none (rehearsal)"


class Place(NamedTuple):
    """Where a step runs."""

    device: Device
    shapes: tuple[Shape, ...]
    repeats: int

    @property
    def is_real(self) -> bool:
        """Whether there is a GPU."""
        return self.device.place == "cuda"

    def median(self, call: Callable[[], Any]) -> float:
        """Milliseconds of a call, the median of several."""
        samples = [self.device.measure(call, None)]
        for _ in range(self.repeats + 1):
            samples.append(self.device.measure(call, samples[-1]))
        return statistics.median(sample.ms for sample in samples[2:])

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random values."""
        made = torch.randn(shape, device=self.device.place)
        return made.to(self.device.dtype if dtype is None else dtype)


counted: collections.Counter[str] = collections.Counter()
"""Launches by kernel, in this process."""


def _count(launch: Launch) -> None:
    counted[launch.kernel.__name__] += 1


def rehearsed() -> Place:
    """The CPU in a GPU's place: the kernels serve its tensors, and are counted and not run."""
    Launch.run = _count  # type: ignore[method-assign]
    dispatch._refused_device = lambda device: ""
    Cuda.CACHE = 16
    return Place(Cuda(Stub(), "cpu"), (SMALL,), 1)


def real() -> Place:
    """The GPU; ends the program where there is none."""
    if not torch.cuda.is_available():
        sys.exit(f"gpu_steps: torch {torch.__version__} finds no GPU; --rehearse does without")
    return Place(Cuda(), roofline.SHAPES, 20)


# -------------------------------------------------------------------------------------- steps


def versions(place: Place, args: argparse.Namespace) -> Iterator[Row]:
    """What the machine has."""
    if place.is_real:
        found = torch.cuda.get_device_properties(0)
        yield {
            "gpu": found.name,
            "multiprocessors": found.multi_processor_count,
            "capability": f"{found.major}.{found.minor}",
            "bytes": found.total_memory,
        }
    yield {"driver": driver(), "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    yield {name: installed(name) for name in PACKAGES}


def ceilings(place: Place, args: argparse.Namespace) -> Iterator[Row]:
    """What the device reaches at best: a copy, and products of 8192 x 8192."""
    size = 8192 if place.is_real else 64
    source = place.tensor(size, 4 * size)
    target = torch.empty_like(source)
    ms = place.median(lambda: target.copy_(source))
    yield {"what": "copy", "TB/s": round(2 * source.nbytes / ms / 1e9, 3)}
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (place.tensor(size, size, dtype=dtype) for _ in range(2))
        yield _rate(str(dtype), size, place.median(functools.partial(torch.mm, a, b.T)))
    single, other = (place.tensor(size, size, dtype=torch.float32) for _ in range(2))
    for name in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = name
        yield _rate(name, size, place.median(lambda: torch.mm(single, other)))
    codes = torch.randint(-127, 128, (size, size), device=place.device.place, dtype=torch.int8)
    yield _rate("int8", size, place.median(lambda: torch._int_mm(codes, codes.T)))


def _rate(name: str, size: int, ms: float) -> Row:
    return {"what": f"product, {name}", "TFLOP/s": round(2 * size**3 / ms / 1e9, 1)}


def small(place: Place, args: argparse.Namespace) -> Iterator[Row]:
    """Small layers, trained and at inference: what a sanitizer watches."""
    for contender in (ONE, EIGHT):
        for what in ("initialisation step", "saturated step", "8-bit forward"):
            mode, data = bench_layers.MODES[what], bench_layers.make_data(SMALL, place.device)
            subject = bench_layers.make_subject(contender, SMALL, data, mode, place.device)
            counted.clear()
            mode.call(subject, data)
            place.device.synchronize()
            yield {"what": what, "tiles": contender.tiles, "launches": counted.total()}
    for name, make, x in _layers(place, small=True):
        try:
            subject = bench_layers.analogfx_arm(make(), analogfx.recipes.afm())
        except ImportError:
            continue  # experts are transformers'
        counted.clear()
        bench_layers.step(subject, bench_layers.Data(x.requires_grad_(), torch.ones_like(x)))
        place.device.synchronize()
        yield {"what": name, "launches": counted.total()}


def race(place: Place, args: argparse.Namespace) -> Iterator[Row]:
    """The benchmark of some shapes and arms; its rows go to a file after each shape."""
    suite = bench_layers.SUITES["cuda"]
    arms = {"own": (), "lightning": (LIGHTNING,), "triton": (TRITON,)}[args.arms]
    contenders = tuple(
        c for c in suite.contenders if c.arm in arms or c.arm not in (LIGHTNING, TRITON)
    )
    shapes = tuple(place.shapes[i] for i in args.shapes if i < len(place.shapes))
    suite = replace(suite, shapes=shapes, contenders=contenders, repeats=place.repeats)
    if not place.is_real:
        suite = replace(suite, modes=("forward", "8-bit forward", "step"), warmup=0)
    rows = bench.bench(place.device, suite, Path(args.rows))
    yield {"what": "rows", "count": len(rows)}


def _step_of(place: Place, shape: Shape, tiles: int) -> Callable[[], None]:
    """A training step with closed ranges, after a first call."""
    mode, data = bench_layers.MODES["step"], bench_layers.make_data(shape, place.device)
    contender = ONE if tiles == 1 else EIGHT
    subject = bench_layers.make_subject(contender, shape, data, mode, place.device)
    mode.call(subject, data)
    return functools.partial(mode.call, subject, data)


def launches(place: Place, args: argparse.Namespace) -> Iterator[Row]:
    """The time of every launch of a step, the slowest first, and how many others torch makes."""
    shape = place.shapes[min(1, len(place.shapes) - 1)]
    for tiles in (1, 8):
        call = _step_of(place, shape, tiles)
        seen = noted(call)
        # By its own clock each: the last of them is queued again, on what it was queued with.
        times = [(place.median(launch.run), launch.kernel.__name__) for launch in seen]
        for ms, name in sorted(times, reverse=True):
            yield {"what": "launch", "tiles": tiles, "shape": str(shape), "kernel": name,
                   "us": round(1e3 * ms, 1)}  # fmt: skip
        yield {"what": "launches of a step", "tiles": tiles, "ours": len(seen),
               "torch's": _torch_launches(call) if place.is_real else None}  # fmt: skip


def noted(call: Callable[[], None]) -> list[Launch]:
    """The launches of a call, which are run, too."""
    seen: list[Launch] = []
    run = Launch.run

    def note(launch: Launch) -> None:
        seen.append(launch)
        run(launch)

    with mock.patch.object(Launch, "run", note):
        call()
    return seen


def _torch_launches(call: Callable[[], None]) -> int:
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    products = ("linear_", "conv_forward", "clamp_gradient")
    return sum(n not in OURS and not n.startswith(products) for n in names)


OURS = ("row_max", "modify_weight", "convert_input", "strip_moments", "new_range", "clip_row")
"""Kernels that compute no product."""

CANDIDATES = (
    Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 4), Blocks(128, 64, 64, 4, 3),
    Blocks(128, 64, 64, 4, 4), Blocks(64, 128, 64, 4, 4), Blocks(128, 256, 64, 8, 3),
    Blocks(64, 256, 64, 8, 4), Blocks(256, 128, 64, 8, 3),
)  # fmt: skip
"""Blocks that a sweep tries for every product."""


def sweep(place: Place, args: argparse.Namespace) -> Iterator[Row]:
    """The time of a whole step with other blocks, and which of its launches became faster."""
    shape = place.shapes[min(1, len(place.shapes) - 1)]
    for block in (None, *(CANDIDATES if place.is_real else CANDIDATES[:1])):
        own = blocks.choose
        chosen = own if block is None else lambda *_, block=block: block
        with mock.patch.object(blocks, "choose", chosen):
            row: Row = {"what": "blocks", "block": block.text if block else "as chosen"}
            if block is not None:
                row |= block.options
            try:
                for tiles in (1, 8):
                    call = _step_of(place, shape, tiles)
                    for launch in noted(call):
                        name = launch.kernel.__name__
                        if name.startswith("linear_"):
                            key = f"{name}, {tiles}, us"
                            row[key] = round(row.get(key, 0) + 1e3 * place.median(launch.run), 1)
            except Exception as error:  # a block that does not fit is a result, too
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[-1][:200]}"
        yield row


def capture(place: Place, args: argparse.Namespace) -> Iterator[Row]:
    """Steps and inference captured in CUDA graphs, decoding, and tf32."""
    shape = place.shapes[0]
    for tiles in (1, 8):
        eager = place.median(call := _step_of(place, shape, tiles))
        if place.is_real:
            call = _captured(call)
        yield {"what": "captured step", "tiles": tiles, "eager ms": round(eager, 4),
               "graph ms": round(place.median(call), 4)}  # fmt: skip
    shape = place.shapes[min(1, len(place.shapes) - 1)]
    for rows in (1, 4, 16):
        few = shape._replace(rows=rows)
        for contender in (LINEAR, ONE, EIGHT):
            for what in ("forward", "8-bit forward"):
                subject, data, mode = _ready(place, few, contender, bench_layers.MODES[what])
                ms = place.median(functools.partial(mode.call, subject, data))
                yield {"what": f"{what}, {rows} rows", "contender": str(contender),
                       "ms": round(ms, 4)}  # fmt: skip


def _layers(place: Place, small: bool) -> Iterator[tuple[str, Callable[[], torch.nn.Module], Any]]:
    """Layers that are no linear ones, as what makes them, with an input of each."""
    device = place.device
    many, sizes = (1, ((16, 6),)) if small else (32, ((256, 56), (512, 14)))
    for channels, size in sizes:
        for layout in ("channels last", "contiguous"):
            x = place.tensor(many, channels, size, size)
            if layout == "channels last":
                x = x.contiguous(memory_format=torch.channels_last)
            conv = functools.partial(torch.nn.Conv2d, channels, channels, 3, padding=1)
            name = f"3 x 3 convolution, {channels} channels, {many} x {size} x {size}, {layout}"
            yield name, lambda conv=conv: conv().to(device.place, device.dtype), x
    routed = (Routed(8192, 2048, 4096, 8), Routed(16, 2048, 4096, 8))
    for shape in (Routed(6, 32, 64, 4),) if small else routed:
        layer = functools.partial(bench_layers.make_layer, shape, device)
        yield str(shape), layer, place.tensor(shape.rows, shape.inputs)


def layers(place: Place, args: argparse.Namespace) -> Iterator[Row]:
    """A forward and a training step of convolutions and experts, digital and analog."""
    arms = {"digital": bench_layers.digital_arm, "analog": bench_layers.analogfx_arm}
    for name, make, x in _layers(place, small=not place.is_real):
        row: Row = {"what": name}
        for arm, subject_of in arms.items():
            try:
                config = analogfx.recipes.afm()
                subject = subject_of(make(), config)
                data = bench_layers.Data(x.detach().requires_grad_(), torch.ones_like(x))
                bench_layers.step(subject, data)
                if arm == "analog":
                    batches = config.pre_post.input_range.init_from_data
                    bench_layers.close_ranges(subject.module, batches, None)
                call = functools.partial(bench_layers.step, subject, data)
                row[f"{arm} step, ms"] = round(place.median(call), 4)
                subject.module.eval()
                call = functools.partial(bench_layers.forward, subject, data)
                row[f"{arm} forward, ms"] = round(place.median(call), 4)
            except Exception as error:  # what one arm cannot do is a result, too
                row[f"{arm} failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        yield row


def _ready(
    place: Place, shape: Shape, contender: Any, mode: Mode
) -> tuple[Subject, bench_layers.Data, Mode]:
    data = bench_layers.make_data(shape, place.device)
    return bench_layers.make_subject(contender, shape, data, mode, place.device), data, mode


def _captured(call: Callable[[], None]) -> Callable[[], None]:
    """A call as a graph, by torch's recipe: warmed up on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay  # type: ignore[no-any-return]


STEPS: dict[str, Callable[[Place, argparse.Namespace], Iterator[Row]]] = {
    step.__name__: step
    for step in (versions, ceilings, small, race, launches, layers, sweep, capture)
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a step and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, no launch is run")
    parser.add_argument("--rows", default="bench_rows.jsonl", help="file of the benchmark's rows")
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1, 2], help="of the benchmark")
    parser.add_argument("--arms", choices=("own", "lightning", "triton"), default="own")
    args = parser.parse_args(argv)
    place = rehearsed() if args.rehearse else real()
    for row in STEPS[args.step](place, args):
        print(json.dumps({"step": args.step, **row}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
