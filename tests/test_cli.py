import subprocess
import sys
from pathlib import Path

import pytest

import analogfx
from analogfx import cli, demo
from analogfx.errors import AnalogfxError

SUMMARY = {
    "digital": 0.98,
    "deployed": {"eager": 0.97, "onnx": 0.96},
    "noise": [
        {
            "std_dev": 0.2,
            "mapped": {"mean": 0.8, "std": 0.05},
            "hardware_aware": {"mean": 0.95, "std": 0.01},
        }
    ],
}


@pytest.fixture
def asked(monkeypatch):
    """What the demo is asked to do, instead of doing it."""
    calls = []

    def run(out, settings):
        calls.append((out, settings))
        return SUMMARY

    monkeypatch.setattr(demo, "run", run)
    return calls


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"analogfx {analogfx.__version__}\n"


def test_is_installed_as_a_command():
    command = Path(sys.executable).parent / "analogfx"
    done = subprocess.run([command, "demo", "--help"], check=True, capture_output=True, text=True)
    defaults = demo.Settings().epochs, demo.quick().epochs
    assert "default: {}, or {} with --quick".format(*defaults) in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["demo"],
        ["demo", "--out", "x", "--epochs", "0"],
        ["demo", "--out", "x", "--epochs", "many"],
        ["demo", "--out", "x", "--seed", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "usage: analogfx" in capsys.readouterr().err


def test_demo_runs_with_defaults(asked, tmp_path):
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    assert asked == [(tmp_path, demo.Settings())]


def test_demo_takes_its_options(asked, tmp_path):
    arguments = ["demo", "--out", str(tmp_path), "--quick", "--seed", "3", "--epochs", "2"]
    assert cli.main(arguments) == 0
    assert asked == [(tmp_path, demo.quick(seed=3, epochs=2))]


def test_demo_tells_result_and_place(asked, tmp_path, capsys):
    cli.main(["demo", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "20%" in printed and "80.0 ±  5.0 %" in printed and "95.0 ±  1.0 %" in printed
    assert str(tmp_path) in printed and "summary.json" in printed
    assert "as model.onnx in ONNX Runtime: 96.0% (in PyTorch: 97.0%)" in printed


def test_own_errors_are_told_without_traceback(monkeypatch, capsys, tmp_path):
    def run(out, settings):
        raise AnalogfxError("what went wrong")

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "analogfx: error: what went wrong\n"


def test_other_errors_are_not_hidden(monkeypatch, tmp_path):
    def run(out, settings):
        raise ZeroDivisionError

    monkeypatch.setattr(demo, "run", run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo", "--out", str(tmp_path)])
