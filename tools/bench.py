"""What an analog layer costs beside a digital one: ``python tools/bench.py --device NAME``.

``--compile`` is another benchmark, of whole models under ``torch.compile``: ``bench_compile``.

Races ``nn.Linear``, analogfx and AIHWKIT-Lightning on the same weights, data and config, appends
one row a figure to ``tools/bench_rows.jsonl``, and prints the figures and the goals. The method is
described in ``docs/benchmark.md``, whose figures ``--table`` writes. Each benchmark is a module of
its own; this is the command: ``bench_layers`` says what is raced.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import roofline
import torch
from bench_devices import Cpu, Cuda, Device, Experts, Recurrent, Row, SmallLayers
from bench_layers import ARMS, SUITES, Suite, measure
from bench_rows import DIGITAL_ARMS, ROOT, append_rows, environment, latest_rows, tables
from tables import aligned, with_section

ROWS = ROOT / "tools" / "bench_rows.jsonl"
PAGE = ROOT / "docs" / "benchmark.md"
TESTS = {
    "cpu": tuple(f"tests/test_parity_{of}.py" for of in ("linear", "conv", "training")),
    "cpu-small": ("tests/test_parity_linear.py",),
    "cpu-recurrent": ("tests/modules/kinds/test_recurrent.py",),
    "cpu-experts": ("tests/modules/kinds/test_experts.py", "tests/kernels/test_experts.py"),
    "cuda": ("tests/kernels",),
}
"""What must be green before anything is measured."""

COMMANDS = {
    "cpu": "python tools/bench.py --table",
    "cpu-small": "python tools/bench.py --device cpu-small --table",
    "cpu-recurrent": "python tools/bench.py --device cpu-recurrent --table",
    "cpu-experts": "python tools/bench.py --device cpu-experts --table",
    "cuda": "python tools/bench.py --device cuda --table",
}
"""The commands that write the sections of the page."""


def require_green(*tests: str) -> None:
    """Refuse to go on unless the numbers are right."""
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"bench: {', '.join(tests)} red; the speed of wrong numbers is not measured")


def find_device(name: str) -> Device:
    """The device of a name; ends the program where there is none."""
    if name != "cuda":
        cpus = (Cpu(), SmallLayers(), Recurrent(), Experts())
        return {device.name: device for device in cpus}[name]
    if not torch.cuda.is_available():
        sys.exit(f"bench: --device cuda needs a GPU, and torch {torch.__version__} finds none")
    return Cuda()


def bench(device: Device, suite: Suite, path: Path) -> list[Row]:
    """Measure a suite and append its rows to a data file: those of a shape all of them or none."""
    device.prepare()
    common = environment(device)
    rows: list[Row] = []
    for shape in suite.shapes:  # what breaks a device later takes nothing of this
        of_shape = [common | row for row in measure(shape, suite, device)]
        append_rows(path, of_shape)
        rows += of_shape
    return rows


def compiled(table: bool) -> None:
    """The benchmark of whole models under ``torch.compile``, a module of its own."""
    import bench_compile  # it imports transformers and the compiler

    if table:
        bench_compile.write_page()
        return
    require_green(*bench_compile.TESTS)
    print(bench_compile.bench())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, or write the recorded figures to its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=SUITES, default="cpu")
    parser.add_argument("--compile", action="store_true", help="models under torch.compile, CPU")
    parser.add_argument("--table", action="store_true", help=f"write the last run to {PAGE.name}")
    optional = [arm for arm in ARMS if arm not in DIGITAL_ARMS]
    parser.add_argument("--without", nargs="+", choices=optional, default=(), help="leave out arms")
    parser.add_argument(
        "--skip-tests", action="store_true", help="for who has run them: measure at once"
    )
    args = parser.parse_args(argv)
    if args.compile:
        compiled(args.table)
        return
    suite = SUITES[args.device]
    if args.table:
        text = tables(latest_rows(ROWS, args.device), suite.goals)
        PAGE.write_text(with_section(PAGE.read_text(), COMMANDS[args.device], text))
        return
    device = find_device(args.device)
    if not args.skip_tests:
        require_green(*TESTS[args.device])
    contenders = tuple(c for c in suite.contenders if c.arm not in args.without)
    suite = dataclasses.replace(suite, contenders=contenders)
    print(tables(bench(device, suite, ROWS), suite.goals))
    if args.device == "cuda":
        print(f"\nOn paper, for an {roofline.H200.name}:\n")
        print(aligned(roofline.totals(roofline.H200, suite.shapes)))


if __name__ == "__main__":
    main()
