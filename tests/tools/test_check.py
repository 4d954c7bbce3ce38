import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import check  # noqa: E402


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What would be run, and the constraints that it would be given."""
    seen = []

    def run(*command):
        parts = [str(part) for part in command]
        if "-c" in parts:
            seen.append(Path(parts[parts.index("-c") + 1]).read_text().splitlines())
        seen.append(parts)
        return True

    monkeypatch.setattr(check, "run", run)
    return seen


def test_another_torch_brings_what_goes_with_it(commands):
    assert check._filled(Path("python"), "2.11")
    constraints, install, lightning = commands
    assert {"torch==2.11.*", "numpy<2.4", "onnx-ir==1.0.0"} <= {*install}
    pinned = {pin.split("==")[0] for pin in constraints}
    assert not pinned & {"torch", "triton", "numpy", "onnx-ir", "setuptools", "aihwkit-lightning"}
    assert "transformers" in pinned
    assert "--no-deps" in lightning and lightning[-1].startswith("aihwkit-lightning==")


def test_an_environment_is_made_once(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "_filled", lambda python, version: True)
    tmp_path.joinpath(".torch-2.11").mkdir()
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["check.py", "--torch", "2.11"])
        assert check.main() == 0
    assert ["venv" in command for command in commands] == [True, False, False]


def test_the_tests_of_another_torch_exist():
    assert all(ROOT.joinpath(name).exists() for name in check.HOOKED)
