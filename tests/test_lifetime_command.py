import json

import pytest
import torch
from torch import nn

import analogfx
from analogfx.cli import main

MODULE = """
import torch
from torch import nn

def make():
    return nn.Linear(6, 4)

def power(model):
    return model(torch.ones(2, 6)).square().mean()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_models_module.py").write_text(MODULE)
    torch.manual_seed(0)
    analog = analogfx.analogize(nn.Linear(6, 4), analogfx.TorchInferenceRPUConfig())
    analogfx.save(analog, tmp_path / "saved")
    return tmp_path


def arguments(**changed):
    given = {
        "model": "a_models_module:make",
        "checkpoint": "saved",
        "metric": "a_models_module:power",
        "noise": "pcm",
        "compensation": "global",
        "times": "1,1d,1y",
        "chips": "2",
        "out": "results",
    }
    return ["evaluate", *(t for k, v in (given | changed).items() for t in (f"--{k}", v))]


def test_a_lifetime_from_a_checkpoint(folder, capsys):
    assert main(arguments()) == 0
    assert "2 chips" in capsys.readouterr().out
    record = json.loads((folder / "results" / "life.json").read_text())
    assert record["times"] == [1.0, 86400.0, 31_536_000.0] and len(record["rows"]) == 6
    assert {p.name for p in (folder / "results").iterdir()} == {
        "life.json",
        "life.csv",
        "life.png",
    }


def test_a_lifetime_goes_on(folder, capsys):
    assert main([*arguments(chips="1"), "--resume"]) == 0
    journal = (folder / "results" / "life.journal").read_text()
    first = json.loads((folder / "results" / "life.json").read_text())["rows"]
    assert main([*arguments(), "--resume"]) == 0
    after = (folder / "results" / "life.journal").read_text()
    assert after.startswith(journal) and after.count("\n") == 1 + 1 + 6
    assert json.loads((folder / "results" / "life.json").read_text())["rows"][:3] == first
    assert main([*arguments(noise="hermes"), "--resume"]) == 2
    assert "name another file" in capsys.readouterr().err


def test_noise_in_products(folder, capsys):
    records = []
    for extra in ([], ["--read-noise", "product"]):
        assert main([*arguments(), *extra]) == 0
        records.append(json.loads((folder / "results" / "life.json").read_text())["rows"])
    assert records[0] != records[1]
    assert main([*arguments(), "--output-noise"]) == 2
    assert "forward.out_noise = 0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "a_models_module:absent"}, "expected package.module:name"),
        ({"metric": "nowhere"}, "expected package.module:name"),
        ({"checkpoint": "elsewhere"}, "no analogfx.json"),
        ({"chips": "0"}, "expected 1 or more"),
    ],
)
def test_mistakes_are_told_on_one_line(folder, capsys, changed, message):
    assert main(arguments(**changed)) == 2
    assert message in capsys.readouterr().err
