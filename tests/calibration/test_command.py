import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import ranged
from torch import nn

import analogfx
from analogfx import cli

CODE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

def data():
    return [(torch.full((2, 4), 0.5), torch.zeros(2)), (torch.full((2, 4), -7.0), torch.zeros(2))]

def number():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture
def checkpoint(here):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    analogfx.save(analogfx.analogize(model, ranged()), here / "before")
    return model


def arguments(**changes):
    given = {
        "--model": "mine:model",
        "--checkpoint": "before",
        "--data": "mine:data",
        "--method": "max",
        "--out": "after",
        **changes,
    }
    return ["calibrate", *(part for pair in given.items() for part in pair)]


def test_a_checkpoint_is_calibrated_into_another(checkpoint, here):
    command = [Path(sys.executable).parent / "analogfx", *arguments(), "--adc"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=here)
    assert "max, from 2 batches" in done.stdout and "out_bound" in done.stdout
    after = analogfx.load(checkpoint, here / "after")
    assert after[0].input_range.item() == 7.0
    assert after[0]._analog.config.forward.out_bound > 0
    assert analogfx.load(checkpoint, here / "before")[0].input_range.item() == 3.0
    torch.testing.assert_close(after[0].weight, checkpoint[0].weight)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--data", "mine:absent", "expected package.module:function"),
        ("--data", "mine:number", "returned a int, not batches"),
        ("--model", "mine:number", "not an nn.Module"),
        ("--quantile", "7", "quantile = 7.0"),
    ],
)
def test_what_cannot_be_is_told_without_a_traceback(option, value, text, checkpoint, capsys):
    assert cli.main(arguments(**{option: value})) == 2
    assert text in capsys.readouterr().err
    assert not Path("after").exists()
