"""The one check command, for developers and for CI: ``python tools/check.py [--only NAME ...]``.

``--torch 2.11`` runs the tests of what hooks into torch and Triton with another torch, in an
environment that is made for it: a few GB, so CI does not.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def check_format() -> bool:
    """Formatting, by ruff."""
    return run(BIN / "ruff", "format", "--check", ".")


def check_lint() -> bool:
    """Lint rules, by ruff."""
    return run(BIN / "ruff", "check", ".")


def check_types() -> bool:
    """Types of the package, by mypy."""
    # No cache: it would belong to the temporary copy that the last run looked at.
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", os.devnull]
    return run_on_package(BIN / "mypy", *options, "-p", "analogfx")


def check_layers() -> bool:
    """The layer law, by import-linter."""
    return run_on_package(BIN / "lint-imports", "--config", ROOT / "pyproject.toml", "--no-cache")


def check_kernels() -> bool:
    """What the compiler makes of the kernels; nothing where there is no triton."""
    if importlib.util.find_spec("triton") is None:
        return True
    return run(sys.executable, "tools/kernel_report.py", "--check")


AIHWKIT = "aihwkit==1.1.0"
"""What the tests of chips compare with."""


def check_oracle() -> bool:
    """AIHWKIT is there for the tests to compare with.

    Without its dependencies: its torchvision is built for a CUDA torch and breaks transformers
    beside a CPU torch, and no part of AIHWKIT that the tests use needs it.
    """
    if importlib.util.find_spec("aihwkit") is not None:
        return True
    return run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", AIHWKIT)


def check_site() -> bool:
    """The documentation as a site, without a broken link or another warning."""
    with tempfile.TemporaryDirectory() as folder:
        build = ("mkdocs", "build", "--quiet", "-f", "tools/site/mkdocs.yml", "-d", folder)
        return run(sys.executable, "-m", *build)


def check_tests() -> bool:
    """The test suite, the README's code blocks included: a process and a thread for each core."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    workers = min(4, os.cpu_count() or 1)  # each holds a few GB
    return run(sys.executable, "-m", "pytest", "-n", str(workers), "--dist", "loadfile")


LIGHTNING = "aihwkit-lightning"

HOOKED = (
    "tests/backend",
    "tests/kernels",
    "tests/ops",
    "tests/test_compile.py",
    "tests/test_ops.py",
    "tests/test_versions.py",
    "tests/onnx/test_export.py",
)
"""Tests of what hooks into parts of torch, Triton and onnx-ir that change."""

OLD = {"2.11": ("numpy<2.4", "onnx-ir==1.0.0", "setuptools<82")}
"""What goes with a torch besides: Triton 3.6's interpreter fails with NumPy 2.4."""


def check_torch(version: str) -> bool:
    """The tests of :data:`HOOKED` with a torch of another version, in an environment for it."""
    folder = ROOT / f".torch-{version}"
    python = folder / "bin" / "python"
    if not folder.joinpath("complete").exists():
        if not (run(sys.executable, "-m", "venv", folder) and _filled(python, version)):
            return False
        folder.joinpath("complete").touch()
    return run(python, "-m", "pytest", *HOOKED)


def _filled(python: Path, version: str) -> bool:
    """Install a torch, and the tested versions of all else that it allows."""
    pins = ROOT.joinpath("constraints.txt").read_text().splitlines()
    pinned = [pin for pin in pins if "==" in pin]
    others = OLD.get(version, ())
    free = {re.split("[<=>]", other)[0] for other in others} | {"torch", "triton", LIGHTNING}
    wanted = ("pytest", "hypothesis", "transformers", "onnx", "onnxscript", "onnxruntime",
              "scikit-learn", "matplotlib", "onnx-ir", "numpy", "setuptools")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch, "constraints.txt")
        constraints.write_text("\n".join(p for p in pinned if p.split("==")[0] not in free))
        install = (python, "-m", "pip", "install", "--quiet")
        torch = f"torch=={version}.*"
        # Without its dependencies: it asks for the one torch that it was released with.
        lightning = next(pin for pin in pinned if pin.startswith(LIGHTNING))
        return run(*install, "-c", constraints, torch, *wanted, *others, "-e", str(ROOT)) and run(
            *install, "--no-deps", lightning
        )


CHECKS = {
    "format": check_format,
    "lint": check_lint,
    "types": check_types,
    "layers": check_layers,
    "kernels": check_kernels,
    "site": check_site,
    "oracle": check_oracle,
    "tests": check_tests,
}


def run(*command: str | Path, cwd: Path = ROOT) -> bool:
    """Run a command and say whether it succeeded."""
    return subprocess.run([str(part) for part in command], cwd=cwd).returncode == 0


def run_on_package(*command: str | Path) -> bool:
    """Run a command beside a copy of the package as a wheel lays it out.

    Tools that read files instead of importing them do not find ``analogfx.passes`` and
    ``analogfx.kernels`` in a checkout, where those are top-level folders.
    """
    setup = "import setuptools; setuptools.setup()"
    with tempfile.TemporaryDirectory() as folder:
        built = run(sys.executable, "-c", setup, "--quiet", "build_py", "--build-lib", folder)
        return built and run(*command, cwd=Path(folder))


def main() -> int:
    """Run the chosen checks, all of them even if one fails; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CHECKS,
        default=list(CHECKS),
        metavar="NAME",
        help=", ".join(CHECKS),
    )
    parser.add_argument("--torch", metavar="VERSION", help="the tests of the compiler, with it")
    args = parser.parse_args()
    if args.torch:
        return 0 if check_torch(args.torch) else 1
    summary = []
    for name in args.only:
        start = time.perf_counter()
        passed = CHECKS[name]()
        seconds = time.perf_counter() - start
        summary.append((passed, f"{'ok' if passed else 'FAILED':6}  {name:7}  {seconds:6.1f} s"))
    print(*(line for _, line in summary), sep="\n")
    return 0 if all(passed for passed, _ in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
