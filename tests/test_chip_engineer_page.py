"""Every command of docs/chip-engineer.md runs, in order."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from analogfx.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "chip-engineer.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def commands():
    return [
        shlex.split(line)
        for block in blocks("bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.py").write_text(blocks("python")[0])
    yield tmp_path
    sys.modules.pop("digits", None)


def test_every_command_runs(folder, capsys):
    told = {}
    for program, *arguments in commands():
        assert program == "analogfx"
        status = main(arguments)
        out = capsys.readouterr()
        assert status == 0, (arguments, out.err)
        told[arguments[0]] = out.out
    assert set(told) == {
        "config", "analogize", "calibrate", "report", "map", "cost", "sensitivity", "evaluate",
        "export", "inspect",
    }  # fmt: skip
    made = {path.name for path in folder.iterdir() if not path.name.startswith("__")}
    assert made == {
        "digits.py", "digits.pt", "chip.json", "analog", "calibrated", "tiles", "life",
        "digits.onnx",
    }  # fmt: skip
    assert "4 of 4 products analog" in told["report"] and "crossbars of 256x256" in told["map"]
