"""What the compiler makes of every kernel: ``python tools/kernel_report.py [--check]``.

Compiles every shipped configuration for sm_80 and sm_90, without a GPU, and prints registers,
spilled bytes (of a thread's stack frame), shared memory, matrix instructions in the machine code,
and divisions that PTX does not round correctly (a kernel that has some must correct them). With
``--check`` it fails where a kernel spills, exceeds the chip's shared memory, computes a product of
16 or 8 bits without the matrix instructions of its chip, or has them wait for one another.

``--roofline`` compiles nothing: it prints what every launch moves and computes for the shapes of
the benchmark, and the least time that an H200 needs for it.
"""

import argparse
import collections
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import roofline
from tables import aligned, markdown, with_section
from tqdm import tqdm

if TYPE_CHECKING:
    from shipped import Shipped

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmark.md"
COMMAND = "python tools/kernel_report.py --roofline --table"

SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that one block can have, by architecture."""

WARPGROUP = ("HGMMA", "IGMMA")
TENSOR = ("HMMA", "IMMA", *WARPGROUP)
WARPGROUP_ROWS = 64
"""Rows of the smallest product that a warpgroup computes in one instruction."""

FORMAT = 2
"""Counted up where cached reports no longer say what a report now says."""


class Report(NamedTuple):
    """What the compiler made of one kernel for one architecture."""

    registers: int
    spilled: int
    """Bytes of a thread's stack frame, which is where registers spill to."""
    shared: int
    matrix: dict[str, int]
    """Matrix instructions in the machine code, by their opcode."""
    approximate: int
    """Divisions in the PTX that are not rounded correctly."""
    serialised: bool = False
    """Whether ptxas makes every product of a warpgroup wait for the one before."""


# --------------------------------------------------------------------------------- compilation


def examine(kernel: "Shipped", arch: int) -> Report:
    """Compile a kernel, or find what was reported of it before in Triton's cache."""
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(_key(kernel, arch))
    path = cache.get_file("report.json")
    if path is not None:
        return Report(**json.loads(Path(path).read_text()))
    report = compiled(kernel, arch)
    cache.put(json.dumps(report._asdict()), "report.json", binary=False)
    return report


def _key(kernel: "Shipped", arch: int) -> str:
    import triton

    identity = (
        FORMAT,
        triton.__version__,
        kernel.kernel.cache_key,  # of its source and all that this calls
        *sorted(kernel.signature.items()),
        *sorted((name, repr(value)) for name, value in kernel.constants.items()),
        *sorted(kernel.attrs.items()),
        *sorted(kernel.options.items()),
        arch,
    )
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def compiled(kernel: "Shipped", arch: int) -> Report:
    """Compile a kernel ahead of time and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(
        kernel.kernel, kernel.signature, kernel.constants, kernel.attrs
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kernel.options)
    text = disassembled(made.asm["cubin"])
    return Report(
        **resources(text),
        shared=made.metadata.shared,
        matrix=matrix_instructions(text),
        approximate=approximate_divisions(made.asm["ptx"]),
        serialised=is_serialised(made.asm["ptx"], arch),
    )


SERIALISED = "C7515"
"""The number of ptxas's note that it serialises the products of warpgroups in a function."""


def is_serialised(ptx: str, arch: int) -> bool:
    """Whether ptxas says that it serialises the products: triton drops what ptxas says."""
    if "wgmma" not in ptx:
        return False
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        name = f"--gpu-name=sm_{arch}a"  # the instructions of this very chip, as triton asks for
        command = [get_ptxas(arch).path, name, str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return SERIALISED in done.stderr


def disassembled(cubin: bytes) -> str:
    """Resources and machine code, as cuobjdump prints them; it comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        # cuobjdump looks for nvdisasm on the path.
        path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def resources(text: str) -> dict[str, int]:
    """Registers and stack bytes in what cuobjdump printed."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump prints no resource usage: {text[:200]!r}")
    return {"registers": int(found[1]), "spilled": int(found[2])}


def matrix_instructions(text: str) -> dict[str, int]:
    """How often every matrix opcode stands in machine code."""
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", text)
    return dict(collections.Counter(o for o in opcodes if o in TENSOR))


def approximate_divisions(ptx: str) -> int:
    """Divisions in PTX that are not those of IEEE 754."""
    return len(re.findall(r"\bdiv\.(?:full|approx)\b", ptx))


# ----------------------------------------------------------------------------------- judgement


def problems(kernel: "Shipped", arch: int, report: Report) -> list[str]:
    """Why a kernel may not be shipped like this."""
    found = []
    if report.spilled:
        found.append(f"spills {report.spilled} bytes")
    if report.shared > SHARED[arch]:
        found.append(f"needs {report.shared} bytes of shared memory, sm_{arch} has {SHARED[arch]}")
    needed = wanted_instructions(kernel, arch)
    if needed and not any(name in report.matrix for name in needed):
        found.append(f"a {kernel.dtype} product without {' or '.join(needed)}")
    if report.serialised:
        found.append(f"its warpgroup products wait for one another (ptxas {SERIALISED})")
    return [f"{kernel.name}, sm_{arch}: {reason}" for reason in found]


def wanted_instructions(kernel: "Shipped", arch: int) -> tuple[str, ...]:
    """Opcodes of which a kernel must have one."""
    if not kernel.matrix:
        return ()
    blocks = [value for name, value in kernel.constants.items() if name.startswith("BLOCK_")]
    large = min(blocks, default=0) >= WARPGROUP_ROWS and kernel.options.get("num_warps", 4) >= 4
    if arch >= 90 and large and kernel.dtype in ("bf16", "fp16", "int8"):
        return WARPGROUP
    return TENSOR


# --------------------------------------------------------------------------------------- main


def chosen_kernels(only: str) -> list["Shipped"]:
    """The shipped kernels whose name has a text in it; ends the program where there are none."""
    try:
        import triton
    except ImportError:
        sys.exit("kernel_report: needs triton, which is for Linux: pip install triton")
    if triton.knobs.runtime.interpret:
        sys.exit("kernel_report: TRITON_INTERPRET is set, so nothing is compiled; unset it")
    from shipped import shipped

    kernels = [kernel for kernel in shipped() if only in kernel.name]
    if not kernels:
        sys.exit(f"kernel_report: no kernel's name has {only!r} in it")
    return kernels


Job = tuple["Shipped", int]


def examine_all(
    jobs: Sequence[Job], workers: int, of: Callable[["Shipped", int], Report] = examine
) -> list[Report]:
    """The reports of all jobs, in their order.

    In threads: most of a compilation is C++ and ptxas, which hold no lock of Python's.
    """
    with ThreadPoolExecutor(workers) as pool:
        reports = pool.map(lambda job: of(*job), jobs)
        bar = tqdm(reports, "compiling", len(jobs), leave=False, disable=None, unit="kernel")
        return list(bar)


def table(jobs: Iterable[Job], reports: Iterable[Report]) -> str:
    """A line for every kernel and architecture."""
    header = ["kernel", "arch", "registers", "spilled", "shared KiB", "matrix", "approx. div"]
    lines = [
        [
            kernel.name,
            f"sm_{arch}",
            str(report.registers),
            str(report.spilled),
            f"{report.shared / 1024:.1f}",
            " ".join(f"{count} {name}" for name, count in report.matrix.items()) or "-",
            str(report.approximate),
        ]
        for (kernel, arch), report in zip(jobs, reports, strict=True)
    ]
    return aligned([header, *lines])


@functools.cache
def paper_table() -> str:
    """The paper model's times of all shapes, as the page shows them."""
    header, *lines = roofline.totals(roofline.H200, roofline.SHAPES)
    return markdown(header, lines)


def print_roofline(write: bool) -> None:
    """Print the paper model, or write its times to their page."""
    if write:
        PAGE.write_text(with_section(PAGE.read_text(), COMMAND, paper_table()))
        return
    for shape in roofline.SHAPES:
        print(aligned(roofline.launches(roofline.H200, shape)), end="\n\n")
    print(aligned(roofline.totals(roofline.H200, roofline.SHAPES)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="fail where a kernel is not as wanted")
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="kernels with this in their name"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile at once")
    parser.add_argument("--roofline", action="store_true", help="the paper model instead")
    parser.add_argument("--table", action="store_true", help=f"with it: write {PAGE.name}")
    args = parser.parse_args(argv)
    if args.roofline:
        print_roofline(args.table)
        return 0
    jobs = [(kernel, arch) for kernel in chosen_kernels(args.only) for arch in args.arch]
    reports = examine_all(jobs, args.jobs)
    found = [
        line for job, report in zip(jobs, reports, strict=True) for line in problems(*job, report)
    ]
    if args.check:
        print(*found, f"{len(jobs)} compiled, {len(found)} not as wanted", sep="\n")
        return 1 if found else 0
    print(table(jobs, reports), *found, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
