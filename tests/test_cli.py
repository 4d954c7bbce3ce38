import os
import subprocess
import sys
from pathlib import Path

import pytest

import analogfx
from analogfx import cli, demo
from analogfx.errors import AnalogfxError

AGED = {"mean": 0.91, "std": 0.03, "low": 0.86, "high": 0.94}
SUMMARY = {
    "digital": 0.98,
    "lifetime": [
        {
            "seconds": 31536000.0,
            "mapped": AGED,
            "hardware_aware": AGED,
            "mapped_compensated": AGED,
            "hardware_aware_compensated": AGED | {"mean": 0.93, "std": 0.02},
        }
    ],
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
        ["demo", "--out", "x", "--seed", "4294967296"],
        ["demo", "--out", "x", "--seed", "1" * 30],
        ["demo", "--out", "x", "--seed", "1" * 5000],
        ["export", "--checkpoint", "x", "--input", "1", "--out", "x", "--seed", "1" * 5000],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
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
    assert "1 y" in printed and "91.0 ±  3.0 %" in printed and "93.0 ±  2.0 %" in printed
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


# argparse itself keeps silent about output that fails at once, without a buffer.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
FORESEEN = {
    "Ctrl-C": (KeyboardInterrupt(), 130, "analogfx: interrupted\n"),
    "a full disk": (
        OSError(28, "No space left on device", "/x/model.onnx"), 1,
        "analogfx: error: [Errno 28] No space left on device: '/x/model.onnx'\n"),
    "no reader": (BrokenPipeError(32, "Broken pipe"), 141, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FORESEEN)
def test_what_is_foreseen_is_told_in_a_line(name, monkeypatch, capfd, tmp_path):
    error, status, message = FORESEEN[name]

    def run(out, settings):
        raise error

    monkeypatch.setattr(demo, "run", run)
    output = os.dup(1)
    try:
        assert cli.main(["demo", "--out", str(tmp_path)]) == status
    finally:
        os.dup2(output, 1)
        os.close(output)
    assert capfd.readouterr().err == message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that Linux has")
def test_output_that_cannot_be_written_is_told_once():
    command = [Path(sys.executable).parent / "analogfx", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    assert done.returncode == 1
    assert done.stderr == "analogfx: error: [Errno 28] No space left on device\n"


def test_output_that_nobody_reads_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [Path(sys.executable).parent / "analogfx", "--version"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_exit_statuses_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"{status} " in told for status in (0, cli.SYSTEM, cli.REFUSED, 130, cli.CLOSED))
