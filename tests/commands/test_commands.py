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
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))

def batch():
    return torch.ones(3, 6)

def power(model):
    return model(torch.ones(2, 6)).square().mean()

def number():
    return 3
"""
MODEL = ("--model", "a_table_module:make", "--checkpoint", "saved")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_table_module.py").write_text(MODULE)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    analogfx.save(analogfx.analogize(model, {"forward": {}}), tmp_path / "saved")
    return tmp_path


def run(capsys, *arguments):
    status = main(arguments)
    told = capsys.readouterr()
    assert status == 0, told.err
    return told.out


def test_a_map(folder, capsys):
    table = run(capsys, "map", *MODEL, "--crossbar", "4x4")
    assert "3 crossbars of 4x4 cells" in table and table.splitlines()[2].startswith("0 ")
    options = ("--crossbar", "8x8", "--single", "--slices", "2", "--inputs", "a_table_module:batch")
    record = json.loads(run(capsys, "map", *MODEL, *options, "--json"))
    assert record["totals"]["devices"] == 2 * (24 + 8) and record["totals"]["macs"] == 3 * 32
    out = run(capsys, "map", *MODEL, "--crossbar", "16x16", "--pack", "--csv", "--picture", "m.png")
    assert [row["crossbar"] for row in csv.DictReader(io.StringIO(out))] == ["0", "0"]
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".png") == ["m.png"]


def test_a_map_that_is_exported(folder, capsys):
    run(capsys, "map", *MODEL, "--crossbar", "4x4", "--export", "tiles")
    record = json.loads((folder / "tiles" / "tiles.json").read_text())
    assert len(record["tiles"]) == 3 and (folder / "tiles" / record["tensors"]["file"]).is_file()


def test_a_cost(folder, capsys):
    options = ("--inputs", "a_table_module:batch")
    table = run(capsys, "cost", *MODEL, *options, "--hardware", "hermes-one-phase")
    assert "not known: the energy of data" in table
    chip = {"name": "mine", "crossbar_rows": 8, "crossbar_columns": 8, "dac_energy_pj": 2.0}
    (folder / "chip.json").write_text(json.dumps(chip))
    record = json.loads(run(capsys, "cost", *MODEL, *options, "--hardware", "chip.json", "--json"))
    assert record["totals"]["energy_pj"]["DAC"] == 3 * (6 + 4) * 2.0
    assert record["totals"]["total_pj"] is None
    out = run(capsys, "cost", *MODEL, *options, "--hardware", "chip.json", "--csv")
    assert [row["DAC_pj"] for row in csv.DictReader(io.StringIO(out))] == ["36.0", "24.0"]


def test_a_sensitivity(folder, capsys):
    metric = ("--metric", "a_table_module:power", "--quiet")
    options = ("--noise", "pcm", "--chips", "2", "--time", "1h", "--file", "run.jsonl")
    first = run(capsys, "sensitivity", *MODEL, *metric, *options, "--json")
    assert len(json.loads(first)["rows"]) == 2
    assert run(capsys, "sensitivity", *MODEL, *metric, *options, "--json") == first
    changed = ("--set", "modifier.quantization_type=DISCRETIZE", "--set", "modifier.res=6")
    out = run(capsys, "sensitivity", *MODEL, *metric, *changed, "--picture", "s.png")
    assert "modifier.res = 6" in out and (folder / "s.png").stat().st_size > 1000
    out = run(capsys, "sensitivity", *MODEL, *metric, "--digital", "--mode", "all_but", "--csv")
    assert len(out.splitlines()) == 3


def test_pages_for_a_browser(folder, capsys):
    run(capsys, "map", *MODEL, "--crossbar", "4x4", "--html", "map.html")
    run(capsys, "report", *MODEL, "--html", "report.html")
    metric = ("--metric", "a_table_module:power", "--digital", "--quiet")
    run(capsys, "sensitivity", *MODEL, *metric, "--html", "sensitivity.html")
    evaluate = ("--metric", "a_table_module:power", "--noise", "pcm", "--chips", "2", "--html")
    run(capsys, "evaluate", *MODEL, *evaluate, "--out", "life")
    names = ["map.html", "report.html", "sensitivity.html", "life/life.html"]
    pages = [(folder / name).read_text() for name in names]
    assert all(page.startswith("<!doctype html>") and "<svg" in page for page in pages)
    assert "3</dd>" in pages[0] and "100.0%" in pages[1] and "1 y" in pages[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("map", "--model", "a_table_module:absent", "--checkpoint", "saved"), "has no attribute"),
        (("map", "--model", "a_table_module:number", "--checkpoint", "saved"), "not an nn.Module"),
        (("map", *MODEL[:3], "elsewhere"), "no analogfx.json"),
        (("map", *MODEL, "--crossbar", "8"), "expected a whole number"),
        (("map", *MODEL, "--picture", "map.doc"), "--picture map.doc"),
        (("map", *MODEL, "--json", "--csv"), "not allowed with"),
        (("cost", *MODEL, "--hardware", "nothing"), "expected isaac, hermes-one-phase"),
        (("cost", *MODEL, "--hardware", "a_table_module.py"), "no JSON"),
        (("sensitivity", *MODEL, "--metric", "nowhere:f"), "No module named"),
        (
            ("sensitivity", *MODEL, "--metric", "a_table_module:power", "--quiet"),
            "noise_model = None",
        ),
        (("sensitivity", *MODEL, "--metric", "a:b", "--set", "x"), "expected FIELD=VALUE"),
    ],
)
def test_mistakes_are_told_on_one_line(folder, capsys, arguments, message):
    try:
        status = main(arguments)
    except SystemExit as usage:
        status = usage.code
    told = capsys.readouterr().err
    assert status == 2 and message in told and "Traceback" not in told


def test_a_hardware_file_with_a_wrong_field_is_told(folder, capsys):
    (folder / "chip.json").write_text('{"name": "x", "crossbar_rows": 8, "adc_energy": 1}')
    assert main(["cost", *MODEL, "--hardware", "chip.json"]) == 2
    told = capsys.readouterr().err
    assert "adc_energy = 1: expected one of" in told and "crossbar_columns = None" in told
