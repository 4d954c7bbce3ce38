"""Everything that a first run on a GPU is to find out: ``python tools/gpu_run.py [--rehearse]``.

Runs from a checkout: nothing need be installed but torch, triton and the packages that the step
``versions`` names, and there is no need for a network. Every step is a process with a limit of its
own. What it found is written when it ends, so a run that is cut off loses one step, and the same
command goes on with the others. ``docs/gpu.md`` says how to read what comes out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


class Run(NamedTuple):
    """One call of this program."""

    out: Path
    """Where results go; a later call with the same folder goes on there."""
    rehearse: bool
    environment: dict[str, str]

    @property
    def results(self) -> Path:
        """A line for every step that was tried."""
        return self.out / "results.jsonl"

    @property
    def figures(self) -> Path:
        """What the steps printed."""
        return self.out / "figures.jsonl"

    @property
    def rows(self) -> Path:
        """The benchmark's rows."""
        return self.out / "bench_rows.jsonl"

    @property
    def log(self) -> Path:
        """All else that was printed."""
        return self.out / "log.txt"

    def of_step(self, name: str, *options: str) -> list[str]:
        """The command of a step of ``gpu_steps``."""
        rehearse = ["--rehearse"] if self.rehearse else []
        script = str(ROOT / "tools" / "gpu_steps.py")
        return [sys.executable, script, name, "--rows", str(self.rows), *options, *rehearse]


Command = list[str]


class Step(NamedTuple):
    """Commands that belong together, run side by side."""

    name: str
    limit: int
    """Seconds."""
    commands: Callable[[Run], list[Command]]


# -------------------------------------------------------------------------------------- steps


def tests(run: Run) -> list[Command]:
    """The kernels' tests in several processes. A rehearsal only collects them."""
    found = subprocess.run(
        [*_pytest(), "--collect-only", "-q", str(ROOT / "tests" / "kernels")],
        cwd=run.out, env=run.environment, capture_output=True, text=True,
    )  # fmt: skip
    ids = [line for line in found.stdout.splitlines() if "::" in line]
    if found.returncode or not ids:
        raise RuntimeError(
            f"no tests can be collected:\n{found.stdout[-2000:]}{found.stderr[-2000:]}"
        )
    if run.rehearse:
        print(f"  {len(ids)} tests")
        return []
    count = max(1, min(14, (os.cpu_count() or 1) - 2))  # ptxas takes a core of each
    where = [str(ROOT / name) for name in ids]
    return [[*_pytest(), "-q", *where[first::count]] for first in range(count)]


def _pytest() -> Command:
    config = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *config]


def sanitized(tool: str) -> Callable[[Run], list[Command]]:
    """A few small steps under a tool of NVIDIA's sanitizer."""

    def commands(run: Run) -> list[Command]:
        watch = _tool(run, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        return [[*watch, *run.of_step("small")]]

    return commands


def profiled(run: Run) -> list[Command]:
    """Counters of the three slowest kernels of the step ``launches``, as ncu prints them."""
    slowest: dict[str, float] = {}
    for row in read(run.figures):
        if row.get("what") == "launch":
            slowest[row["kernel"]] = max(slowest.get(row["kernel"], 0.0), row["us"])
    names = sorted(slowest, key=lambda name: -slowest[name])[:3]
    if not names:
        raise RuntimeError("the step launches has found no kernels")
    watch = _tool(run, "ncu", "--clock-control", "none", "--set", "full", "--launch-count", "3",
                  "--kernel-name", f"regex:^({'|'.join(names)})$")  # fmt: skip
    return [[*watch, *run.of_step("launches")]]


def _tool(run: Run, name: str, *options: str) -> Command:
    """A tool in front of a command; in a rehearsal none."""
    if run.rehearse:
        return []
    folder = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], f"{folder}/bin"]))
    if found is None:
        raise Absent(f"{name} is not installed")
    return [found, *options]


class Absent(Exception):
    """The machine lacks what a step needs."""


def one(name: str, *options: str) -> Callable[[Run], list[Command]]:
    """A step of ``gpu_steps``."""
    return lambda run: [run.of_step(name, *options)]


STEPS = (
    Step("versions", 60, one("versions")),
    Step("ceilings", 60, one("ceilings")),
    Step("tests", 240, tests),
    Step("memcheck", 120, sanitized("memcheck")),
    Step("racecheck", 120, sanitized("racecheck")),
    Step("bench 4096", 150, one("race", "--shapes", "1")),
    Step("launches", 60, one("launches")),
    Step("layers", 120, one("layers")),
    Step("bench 1024", 90, one("race", "--shapes", "0")),
    Step("bench 14336", 150, one("race", "--shapes", "2")),
    Step("ncu", 120, profiled),
    Step("capture", 120, one("capture")),
    Step("sweep", 300, one("sweep")),
    Step("bench, Lightning", 180, one("race", "--shapes", "0", "1", "--arms", "lightning")),
    # It tunes itself for minutes, and an error of it may take the device along.
    Step("bench, Lightning's Triton", 400, one("race", "--shapes", "1", "--arms", "triton")),
)
"""What is run, in this order: what is most wanted first."""

# ------------------------------------------------------------------------------------ running


def prepared(args: argparse.Namespace) -> Run:
    """Make the folder of results, and an environment in which the checkout can be imported."""
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(checkout_as_package(out / "site"))]
    if args.wheels and not (out / "wheels").is_dir():
        wheels = sorted(str(wheel) for wheel in Path(args.wheels).glob("*.whl"))
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target",
             str(out / "wheels"), *wheels], check=True,
        )  # fmt: skip
    if args.wheels:
        paths.append(str(out / "wheels"))
    cache = out / "triton-cache"
    if args.cache and not cache.is_dir():
        with tarfile.open(args.cache) as archive:
            archive.extractall(cache, filter="data")
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONSAFEPATH": ""}
    if args.rehearse:  # it compiles nothing, and interprets nothing
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return Run(out, args.rehearse, environment)


def checkout_as_package(folder: Path) -> Path:
    """The checkout as an installed package, by links: passes and kernels inside of it."""
    import tomllib  # from Python 3.11 on; the tests import this file in 3.10

    package = folder / "analogfx"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (*(ROOT / "analogfx").iterdir(), ROOT / "passes", ROOT / "kernels"):
        package.joinpath(source.name).symlink_to(source)
    about = folder / "analogfx.dist-info"
    about.mkdir(exist_ok=True)
    source = (ROOT / "analogfx" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE)
    about.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: analogfx\nVersion: {version}\n"
    )
    # Torch finds the backend by its entry point.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = []
    for group, names in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {where}" for name, where in names.items())]
    about.joinpath("entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def execute(step: Step, run: Run, limit: float) -> Row:
    """Run a step; whatever becomes of it is a row."""
    start = time.monotonic()
    row: Row = {"step": step.name, "date": _now()}
    try:
        codes, printed = side_by_side(step.commands(run), run, limit)
        row["status"] = "cut" if None in codes else "failed" if any(codes) else "ok"
        row["codes"] = codes
        keep(printed, step.name, run)
    except Absent as reason:
        row |= {"status": "absent", "reason": str(reason)}
    except Exception as error:  # the next step may do better
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return row | {"seconds": round(time.monotonic() - start, 1)}


def side_by_side(
    commands: list[Command], run: Run, limit: float
) -> tuple[list[int | None], list[str]]:
    """Exit statuses and what was printed; None for what did not end in time and was killed."""
    end = time.monotonic() + limit
    files = [run.out / f".printed-{number}" for number in range(len(commands))]
    running = []
    for command, file in zip(commands, files, strict=True):
        with file.open("w") as target:
            options: Any = {"stdout": target, "stderr": subprocess.STDOUT}
            running.append(subprocess.Popen(command, cwd=run.out, env=run.environment, **options))
    codes: list[int | None] = []
    for process in running:
        try:
            codes.append(process.wait(max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    printed = [file.read_text(errors="replace") for file in files]
    for file in files:
        file.unlink()
    return codes, printed


def keep(printed: list[str], name: str, run: Run) -> None:
    """Figures into their file, and all that was printed into the log."""
    with run.figures.open("a") as figures, run.log.open("a") as log:
        for text in printed:
            log.write(f"==== {name}\n{text}\n")
            figures.writelines(
                f"{line}\n" for line in text.splitlines() if line.startswith('{"step"')
            )


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def done(run: Run) -> set[str]:
    """Steps that need no other try."""
    return {row["step"] for row in read(run.results) if row["status"] in ("ok", "absent")}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------ showing


def report(run: Run) -> str:
    """What has been found so far: steps, goals, and where the time of a step goes."""
    title = "# A rehearsal: its figures mean nothing" if run.rehearse else "# A run on a GPU"
    lines = [title, "", "| step | status | s |", "| --- | --- | --- |"]
    last = {row["step"]: row for row in read(run.results)}
    for name, row in last.items():
        reason = f": {row['reason'].splitlines()[0]}" if row.get("reason") else ""
        lines.append(f"| {name} | {row['status']}{reason} | {row['seconds']} |")
    lines += ["", goals(run), "", "```"]
    lines += [json.dumps(row, ensure_ascii=False) for row in read(run.figures)]
    return "\n".join([*lines, "```", ""])


def goals(run: Run) -> str:
    """The benchmark's tables; of figures that were taken twice, the last."""
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from bench_layers import GPU_GOALS\nfrom bench_rows import tables\n"
        "rows = map(json.loads, open(sys.argv[2]))\n"
        "names = ('what', 'rows', 'inputs', 'outputs', 'arm', 'tiles')\n"
        "print(tables([*{tuple(r[n] for n in names): r for r in rows}.values()], GPU_GOALS))"
    )
    if not run.rows.exists():
        return "No figure of the benchmark has been taken."
    command = [sys.executable, "-c", script, str(ROOT / "tools"), str(run.rows)]
    made = subprocess.run(command, cwd=run.out, env=run.environment, capture_output=True, text=True)
    return made.stdout.strip() or f"No table can be made: {made.stderr.strip()[-500:]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has not been run yet; return 1 if something of it failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", default="gpu-run", help="folder of the results; goes on there")
    parser.add_argument("--minutes", type=float, default=10.0, help="to be done in")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, no launch is run")
    parser.add_argument("--wheels", help="folder of wheels to install first, without a network")
    parser.add_argument("--cache", help="archive of Triton's compiled cache")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    run = prepared(args)
    failed = False
    for step in STEPS:
        left = end - time.monotonic()
        if step.name not in args.only or step.name in done(run):
            continue
        if left < 5:
            print(f"{step.name}: no time is left; the same command goes on with it")
            continue
        row = execute(step, run, min(step.limit, left))
        with run.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        (run.out / "report.md").write_text(report(run))
        failed |= row["status"] in ("failed", "cut")
        print(
            f"{step.name}: {row['status']} {row.get('reason', '')} {row['seconds']} s", flush=True
        )
    print(report(run))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
