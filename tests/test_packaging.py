import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"analogfx": "analogfx", "passes": "analogfx/passes", "kernels": "analogfx/kernels"}


def python(code, cwd, **variables):
    """Run code in a new interpreter, whose path starts with ``cwd``; return what it printed."""
    command, env = [sys.executable, "-c", code], os.environ | variables
    done = subprocess.run(command, cwd=cwd, env=env, check=True, capture_output=True, text=True)
    return done.stdout


def test_import_leaves_triton_alone(tmp_path):
    code = "import sys, analogfx; print('triton' in sys.modules)"
    assert python(code, tmp_path).strip() == "False"


def test_import_is_cheap_beside_torch(tmp_path):
    # In time of the processor, and as a share of torch's own import: other processes, and a slower
    # machine, change neither much.
    code = """
from time import process_time
start = process_time()
import torch
middle = process_time()
import analogfx
print((process_time() - middle) / (middle - start))
"""
    # From bytecode, as an installed package is imported; the first run writes it.
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    assert min(float(python(code, tmp_path, **cached)) for _ in range(4)) <= 0.3


def test_transformers_ignores_our_kernels_folder():
    code = "import kernels; from transformers import GPT2LMHeadModel; print(kernels.__file__)"
    assert python(code, ROOT).strip() == str(ROOT / "kernels" / "__init__.py")


@pytest.mark.parametrize("folder", ["kernels", "passes"])
def test_mapped_folders_import_nothing_of_ours(folder):
    docstring, *rest = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    for statement in rest:  # a function may import when it is called
        assert isinstance(statement, ast.ImportFrom | ast.FunctionDef)
        assert getattr(statement, "module", "typing") == "typing"


def test_wheel_holds_every_module_inside_the_package(tmp_path):
    # A copy, because setuptools leaves a build folder beside the sources.
    source = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder)
    for file in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / file, source)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "."], cwd=source, check=True)

    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert packed == expected
