import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import analogfx

PATH = Path(__file__).resolve().parents[2] / "tools" / "bench.py"
SPEC = importlib.util.spec_from_file_location("bench", PATH)
bench = importlib.util.module_from_spec(SPEC)
sys.modules["bench"] = bench  # dataclasses look their module up
SPEC.loader.exec_module(bench)

SHAPE = bench.Shape(4, 16, 8)
SUITE = bench.Suite(shapes=(SHAPE,), repeats=2, warmup=1)


@pytest.fixture
def data():
    torch.manual_seed(1)
    return bench.make_data(SHAPE)


@pytest.fixture
def threads():
    """Whatever number of threads a test leaves behind is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recorded(tmp_path, threads):
    """The rows of a run, and the data file that it wrote."""
    path = tmp_path / "rows.jsonl"
    return bench.bench("cpu", SUITE, path), path


# ---------------------------------------------------------------------------------------- arms


def test_lightning_gets_every_value_of_our_config():
    ours = bench.afm(SHAPE, 8)
    theirs = analogfx.config.as_config(bench.lightning_config(ours))
    assert theirs == ours
    assert theirs.forward.inp_res == 254 and theirs.mapping.max_input_size == 2


@pytest.mark.parametrize("tiles", [1, 8])
def test_both_tools_compute_the_same(data, tiles):
    outputs = []
    for arm in ("analogfx", "lightning"):
        contender = bench.Contender(arm, tiles)
        subject = bench.make_subject(contender, SHAPE, data, bench.MODES["forward"])
        outputs.append(subject.module(data.x))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("arm", ["analogfx", "lightning"])
def test_a_step_clips(data, arm):
    subject = bench.make_subject(bench.Contender(arm, 1), SHAPE, data, bench.MODES["step"])
    with torch.no_grad():
        subject.module.weight[:, 0] = 100.0
    bench.step(subject, data)
    assert subject.module.weight.max() < 99


def test_every_arm_starts_from_the_same_weights(data):
    subjects = [
        bench.make_subject(contender, SHAPE, data, bench.MODES["step"])
        for contender in SUITE.contenders
    ]
    assert all(torch.equal(s.module.weight, subjects[0].module.weight) for s in subjects)


# --------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("arm", ["analogfx", "lightning"])
@pytest.mark.parametrize("what", bench.MODES)
def test_modes_put_a_layer_into_their_state(data, arm, what):
    mode = bench.MODES[what]
    module = bench.make_subject(bench.Contender(arm, 2), SHAPE, data, mode).module
    assert module.training == mode.training
    assert module.input_range_update_idx.tolist() == [500 if mode.closed else 1] * 2
    if mode.input_range is None:
        halves = data.x.split(8, dim=1)
        torch.testing.assert_close(module.input_range, 18 * torch.stack([h.std() for h in halves]))
    else:
        assert module.input_range.tolist() == [mode.input_range] * 2


def test_a_step_trains_everything(data):
    subject = bench.make_subject(bench.ONE, SHAPE, data, bench.MODES["step"])
    before = [p.detach().clone() for p in subject.module.parameters()]
    bench.step(subject, data)
    assert data.x.grad is not None
    after = list(subject.module.parameters())
    assert len(after) == 3 and not any(map(torch.equal, before, after))


# --------------------------------------------------------------------------------- measurements


def test_race_gives_every_call_its_turn_in_every_round():
    calls = []
    times = bench.race("", [lambda: calls.append("a"), lambda: calls.append("b")], 20, warmup=1)
    assert [len(t) for t in times] == [20, 20] and min(map(min, times)) >= 0
    rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(rounds) == 21
    assert {tuple(r) for r in rounds} == {("a", "b"), ("b", "a")}


class Keeps(nn.Module):
    """Saves its own output twice, and its parameter and input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        y = torch.exp(x * self.weight)
        return y.view(-1) * y.view(-1).detach()


def test_saved_bytes_counts_storages_once(data):
    assert bench.saved_bytes(bench.Subject(Keeps(), None), data) == 4 * data.x.numel()


def test_a_digital_layer_saves_nothing_beyond_its_inputs(data):
    assert bench.saved_bytes(bench.linear_arm(nn.Linear(16, 8), None), data) == 0


def test_aten_ops_counts_calls_from_outside(data, threads):
    torch.set_num_threads(2)
    assert bench.aten_ops(bench.linear_arm(nn.Linear(16, 8), None), data) == 1
    assert torch.get_num_threads() == 2


def test_aten_ops_sees_inside_our_ops(data):
    tiles = {
        n: bench.aten_ops(
            bench.make_subject(bench.Contender("analogfx", n), SHAPE, data, bench.MODES["step"]),
            data,
        )
        for n in (1, 8)
    }
    assert 10 < tiles[1] < tiles[8]


def test_a_row_has_median_and_percentiles():
    row = bench.make_row("step", SHAPE, bench.ONE, "ms", [5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (row["median"], row["p20"], row["p80"], row["repeats"]) == (3.5, 2.0, 5.0, 6)
    assert (row["rows"], row["inputs"], row["outputs"]) == SHAPE
    assert (row["arm"], row["tiles"]) == ("analogfx", 1)


# -------------------------------------------------------------------------------------- records


def test_a_run_records_every_figure_of_every_contender(recorded):
    rows, path = recorded
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    figures = {*bench.MODES, "saved for backward", "training forward"}
    assert len(rows) == len(figures) * len(SUITE.contenders)
    assert {(row["what"], bench.contender_of(row)) for row in rows} == {
        (what, contender) for what in figures for contender in SUITE.contenders
    }
    for row in rows:
        assert row.keys() >= {"date", "commit", "torch", "analogfx", "cpu", "cores", "config"}
        assert row["threads"] == row["cores"]
        if row["unit"] == "ms":
            assert 0 < row["p20"] <= row["median"] <= row["p80"]
            assert row["ratio"] == 1 or row["arm"] != bench.DIGITAL


def test_the_last_run_of_a_device_is_shown(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert bench.latest_rows(path, "cpu") == []
    runs = [("cpu", "1"), ("cpu", "2"), ("cpu", "2"), ("cuda", "3")]
    bench.append_rows(path, [{"device": device, "date": date} for device, date in runs[:2]])
    bench.append_rows(path, [{"device": device, "date": date} for device, date in runs[2:]])
    assert [row["date"] for row in bench.latest_rows(path, "cpu")] == ["2", "2"]


# --------------------------------------------------------------------------------------- tables


def test_goals_say_reached_or_missed():
    rows = [
        bench.make_row("step", SHAPE, contender, "ms", [time])
        for contender, time in ((bench.LINEAR, 10.0), (bench.ONE, 14.0), (bench.PEER_ONE, 19.0))
    ]
    goals = [
        bench.Goal("step", bench.ONE, bench.LINEAR, 1.4),
        bench.Goal("step", bench.ONE, bench.PEER_ONE, 0.7),
    ]
    table = bench.goal_table(rows, goals).splitlines()
    assert "step: analogfx, 1 tile ≤ 1.4 × nn.Linear | 1.40 reached" in table[2]
    assert "0.74 **missed**" in table[3]


def test_tables_hold_every_figure(recorded):
    rows, _ = recorded
    text = bench.tables(rows, SUITE)
    for row in rows:
        assert f"**{row['what']}**, {row['unit']}" in text
        assert bench.cell(row) in text


def test_the_page_shows_the_recorded_figures(tmp_path, monkeypatch):
    page = tmp_path / "benchmark.md"
    page.write_text(bench.PAGE.read_text())
    monkeypatch.setattr(bench, "PAGE", page)
    bench.main(["--table"])
    assert page.read_text() == PATH.parents[1].joinpath("docs", "benchmark.md").read_text()


# --------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("green", [True, False])
def test_nothing_is_measured_when_parity_is_red(tmp_path, green):
    tests = tmp_path / "test_parity.py"
    tests.write_text(f"def test_parity():\n    assert {green}\n")
    if green:
        bench.require_parity(str(tests))
    else:
        with pytest.raises(SystemExit, match="red; the speed"):
            bench.require_parity(str(tests))
