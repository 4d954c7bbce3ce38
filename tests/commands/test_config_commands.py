import csv
import io
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
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
"""
FACTORY = ("--model", "a_config_module:make")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_config_module.py").write_text(MODULE)
    return tmp_path


def run(capsys, *arguments, status=0):
    found = main(arguments)
    told = capsys.readouterr()
    assert found == status, told.err
    return told.out + told.err


def test_from_a_recipe_to_a_report(folder, capsys):
    run(capsys, "config", "init", "--recipe", "afm", "--out", "afm.json")
    config = analogfx.TorchInferenceRPUConfig.from_json((folder / "afm.json").read_text())
    assert config == analogfx.recipes.afm()
    out = run(capsys, "analogize", *FACTORY, "--config", "afm.json", "--out", "saved")
    assert "2 of 2 products analog" in out
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    analog = analogfx.load(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), "saved")
    assert torch.equal(analog[0].weight, model[0].weight)
    assert analog[0]._analog.config == config
    saved = (*FACTORY, "--checkpoint", "saved")
    assert "2 of 2 products analog" in run(capsys, "report", *saved)
    assert json.loads(run(capsys, "report", *saved, "--json"))["coverage"] == 1.0
    rows = list(csv.DictReader(io.StringIO(run(capsys, "report", *saved, "--csv"))))
    assert [(r["name"], r["weight_shape"], r["status"]) for r in rows] == [
        ("0", "4x6", "analog"),
        ("2", "2x4", "analog"),
    ]


def test_a_mapping_from_a_file(folder, capsys):
    (folder / "m.json").write_text(json.dumps({"2": None, "*": {"mapping": {"max_input_size": 3}}}))
    out = run(capsys, "analogize", *FACTORY, "--config", "m.json", "--out", "saved")
    assert "1 of 2 products analog" in out
    assert "4 modules" in run(capsys, "config", "check", "m.json", *FACTORY)
    status = run(capsys, "analogize", *FACTORY, "--config", "m.json", "--strict", "--out", "s")
    assert "1 of 2" in status  # what the config leaves digital was asked for


def test_check(folder, capsys):
    assert "plain: can run" in run(capsys, "config", "check", "plain")
    (folder / "bad.json").write_text(json.dumps({"forward": {"inp_res": 8, "out_res": 254}}))
    out = run(capsys, "config", "check", "bad.json", status=2)
    assert "forward.inp_res = 8" in out and "forward.out_res = 254" in out
    ranged = {"pre_post": {"input_range": {"enable": True}}, "forward": {"inp_res": 8}}
    (folder / "odd.json").write_text(json.dumps({"a*": ranged, "b*": None}))
    out = run(capsys, "config", "check", "odd.json")
    assert "doubtful: forward.inp_res = 8" in out and "analogfx.bits(8)" in out


def test_diff(folder, capsys):
    assert "the same" in run(capsys, "config", "diff", "afm", "afm")
    (folder / "m.json").write_text(json.dumps({"a": {"clip": {"sigma": 2}}, "b": None}))
    (folder / "n.json").write_text(json.dumps({"a": {"clip": {"sigma": 3}}}))
    out = run(capsys, "config", "diff", "m.json", "n.json", status=2)
    lines = [line.split() for line in out.splitlines()]
    assert ["a:", "clip.sigma", "2.0", "3.0"] in lines and ["b", "null", "-"] in lines
    assert "2 fields differ" in out
    out = run(capsys, "config", "diff", "plain", "afm", status=2)
    assert "forward.inp_res" in out and "mapping" not in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("config", "check", "nothing"), 2, "expected plain, afm, or a JSON file"),
        (("config", "check", "a_config_module.py"), 2, "is no JSON"),
        (("config", "init", "--out", "a_config_module.py"), 1, "File exists"),
        (("analogize", "--model", "x:y", "--config", "plain", "--out", "o"), 2, "No module named"),
    ],
)
def test_mistakes_are_told(folder, capsys, arguments, status, message):
    out = run(capsys, *arguments, status=status)
    assert message in out and "Traceback" not in out
