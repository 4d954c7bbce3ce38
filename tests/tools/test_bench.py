import dataclasses
import json
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import analogfx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # where a command finds its modules
import bench  # noqa: E402
import bench_devices  # noqa: E402
import bench_layers as layers  # noqa: E402
import bench_rows as rows_of  # noqa: E402

SHAPE = layers.Shape(4, 16, 8)
SUITE = layers.Suite(shapes=(SHAPE,), repeats=2, warmup=1)
GPU_SUITE = dataclasses.replace(layers.SUITES["cuda"], shapes=(SHAPE,), repeats=2, warmup=1)
CPU = bench_devices.Cpu()


class Event:
    """Of an imaginary GPU that is done when it is asked."""

    def __init__(self, api):
        self.api = api

    def record(self):
        self.api.queue.append("event")
        self.at = len(self.api.queue)

    def synchronize(self):
        self.api.queue.append("wait")

    def elapsed_time(self, end):
        return 0.5 * (end.at - self.at)


class Api:
    """What the benchmark asks of ``torch.cuda``, for a machine without a GPU."""

    def __init__(self, syncs=0, seen=True):
        self.queue, self.mode = [], "default"
        self.syncs, self.seen = syncs, seen
        self.held = 1000

    def Event(self, enable_timing):
        return Event(self)

    def _sleep(self, cycles):
        self.queue.append(cycles)

    def synchronize(self):
        pass

    def get_device_name(self):
        return "imaginary"

    def memory_allocated(self):
        return self.held

    def reset_peak_memory_stats(self):
        self.peak = self.held

    def max_memory_allocated(self):
        return self.peak

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def touch(self):
        """A call that synchronises as often as the test says."""
        for _ in range(self.syncs):
            if self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.mode == "warn" and self.seen:
                warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


@pytest.fixture
def gpu(monkeypatch):
    """A device that times by events, on the CPU."""
    monkeypatch.setattr(bench_devices.Cuda, "CACHE", 16)
    return bench_devices.Cuda(Api(), "cpu")


@pytest.fixture
def data():
    torch.manual_seed(1)
    return layers.make_data(SHAPE, CPU)


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
    return bench.bench(CPU, SUITE, path), path


def subject_of(contender, data, mode):
    return layers.make_subject(contender, SHAPE, data, layers.MODES[mode], CPU)


# ---------------------------------------------------------------------------------------- arms


def test_lightning_gets_every_value_of_our_config():
    ours = layers.afm(SHAPE, 8)
    theirs = analogfx.config.as_config(layers.lightning_config(ours))
    assert theirs == ours
    assert theirs.forward.inp_res == 254 and theirs.mapping.max_input_size == 2


@pytest.mark.parametrize("tiles", [1, 8])
def test_both_tools_compute_the_same(data, tiles):
    outputs = []
    for arm in ("analogfx", "lightning"):
        contender = layers.Contender(arm, tiles)
        subject = subject_of(contender, data, "forward")
        outputs.append(subject.module(data.x))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("arm", ["analogfx", "lightning"])
def test_a_step_clips(data, arm):
    subject = subject_of(layers.Contender(arm, 1), data, "step")
    with torch.no_grad():
        subject.module.weight[:, 0] = 100.0
    layers.step(subject, data)
    assert subject.module.weight.max() < 99


def test_every_arm_starts_from_the_same_weights(data):
    subjects = [subject_of(contender, data, "step") for contender in SUITE.contenders]
    assert all(torch.equal(s.module.weight, subjects[0].module.weight) for s in subjects)


# --------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("arm", ["analogfx", "lightning"])
@pytest.mark.parametrize("what", layers.MODES)
def test_modes_put_a_layer_into_their_state(data, arm, what):
    mode = layers.MODES[what]
    module = subject_of(layers.Contender(arm, 2), data, what).module
    assert module.training == mode.training
    assert module.input_range_update_idx.tolist() == [500 if mode.closed else 1] * 2
    if mode.input_range is None:
        halves = data.x.split(8, dim=1)
        torch.testing.assert_close(module.input_range, 18 * torch.stack([h.std() for h in halves]))
    else:
        assert module.input_range.tolist() == [mode.input_range] * 2


def test_a_step_trains_everything(data):
    subject = subject_of(layers.ONE, data, "step")
    before = [p.detach().clone() for p in subject.module.parameters()]
    layers.step(subject, data)
    assert data.x.grad is not None
    after = list(subject.module.parameters())
    assert len(after) == 3 and not any(map(torch.equal, before, after))


# --------------------------------------------------------------------------------- measurements


def test_race_gives_every_call_its_turn_in_every_round():
    calls = []
    times = layers.race("", [lambda: calls.append("a"), lambda: calls.append("b")], 20, 1, CPU)
    assert [len(t) for t in times] == [20, 20] and min(min(t)[0] for t in times) >= 0
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
    assert layers.saved_bytes(layers.Subject(Keeps(), None), data) == 4 * data.x.numel()


def test_a_digital_layer_saves_nothing_beyond_its_inputs(data):
    assert layers.saved_bytes(layers.digital_arm(nn.Linear(16, 8), None), data) == 0


def test_aten_ops_counts_calls_from_outside(data, threads):
    torch.set_num_threads(2)
    assert layers.aten_ops(layers.digital_arm(nn.Linear(16, 8), None), data) == 1
    assert torch.get_num_threads() == 2


def test_aten_ops_sees_inside_our_ops(data):
    tiles = {
        n: layers.aten_ops(
            subject_of(layers.Contender("analogfx", n), data, "step"),
            data,
        )
        for n in (1, 8)
    }
    assert 10 < tiles[1] < tiles[8]


def test_a_row_has_median_and_percentiles():
    row = rows_of.make_row("step", SHAPE, layers.ONE, "ms", [5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (row["median"], row["p20"], row["p80"], row["repeats"]) == (3.5, 2.0, 5.0, 6)
    assert (row["rows"], row["inputs"], row["outputs"]) == SHAPE
    assert (row["arm"], row["tiles"]) == ("analogfx", 1)


# -------------------------------------------------------------------------------------- records


def test_a_run_records_every_figure_of_every_contender(recorded):
    rows, path = recorded
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    figures = {*SUITE.modes, "saved for backward", "training forward"}
    assert len(rows) == len(figures) * len(SUITE.contenders)
    assert {(row["what"], rows_of.contender_of(row)) for row in rows} == {
        (what, contender) for what in figures for contender in SUITE.contenders
    }
    for row in rows:
        assert row.keys() >= {"date", "commit", "torch", "analogfx", "cpu", "cores", "config"}
        assert row["threads"] == row["cores"]
        if row["unit"] == "ms":
            assert 0 < row["p20"] <= row["median"] <= row["p80"]
            assert row["ratio"] == 1 or row["arm"] != layers.DIGITAL


def test_the_last_run_of_a_device_is_shown(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert rows_of.latest_rows(path, "cpu") == []
    runs = [("cpu", "1"), ("cpu", "2"), ("cpu", "2"), ("cuda", "3")]
    rows_of.append_rows(path, [{"device": device, "date": date} for device, date in runs[:2]])
    rows_of.append_rows(path, [{"device": device, "date": date} for device, date in runs[2:]])
    assert [row["date"] for row in rows_of.latest_rows(path, "cpu")] == ["2", "2"]


# --------------------------------------------------------------------------------------- tables


def test_goals_say_reached_or_missed():
    rows = [
        rows_of.make_row("step", SHAPE, contender, "ms", [time])
        for contender, time in ((layers.LINEAR, 10.0), (layers.ONE, 14.0), (layers.PEER_ONE, 19.0))
    ]
    goals = [
        layers.Goal("step", layers.ONE, layers.LINEAR, 1.4),
        layers.Goal("step", layers.ONE, layers.PEER_ONE, 0.7),
    ]
    table = rows_of.goal_table(rows, goals).splitlines()
    assert "step: analogfx, 1 tile ≤ 1.4 × nn.Linear | 1.40 reached" in table[2]
    assert "0.74 **missed**" in table[3]


def test_tables_hold_every_figure(recorded):
    rows, _ = recorded
    text = rows_of.tables(rows, SUITE.goals)
    for row in rows:
        assert f"**{row['what']}**, {row['unit']}" in text
        assert rows_of.cell(row) in text


@pytest.mark.parametrize("device", bench.TESTS)
def test_the_page_shows_the_recorded_figures(device, tmp_path, monkeypatch):
    page = tmp_path / "benchmark.md"
    page.write_text(bench.PAGE.read_text())
    monkeypatch.setattr(bench, "PAGE", page)
    bench.main(["--table", "--device", device])
    assert page.read_text() == ROOT.joinpath("docs", "benchmark.md").read_text()


# --------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("green", [True, False])
def test_nothing_is_measured_when_tests_are_red(tmp_path, green):
    tests = tmp_path / "test_parity.py"
    tests.write_text(f"def test_parity():\n    assert {green}\n")
    if green:
        bench.require_green(str(tests))
    else:
        with pytest.raises(SystemExit, match="red; the speed"):
            bench.require_green(str(tests))


# ----------------------------------------------------------------------------------------- GPU


def test_a_gpu_is_timed_by_events_with_a_head_start(gpu):
    sample = gpu.measure(lambda: gpu.api.queue.append("call"), None)
    cycles, *rest = gpu.api.queue
    assert rest == ["event", "call", "event", "wait"]
    assert sample.ms == 1.0  # two places of the queue further
    gpu.measure(lambda: None, sample._replace(host_ms=3.0))
    gpu.measure(lambda: None, sample._replace(host_ms=5000.0))
    waits = [entry for entry in gpu.api.queue if isinstance(entry, int)]
    assert [wait / cycles for wait in waits] == [1, 7, 100]


def test_peak_bytes_are_those_of_the_call_alone(gpu):
    def call():
        gpu.api.peak = 1234

    gpu.api.peak = 99_999  # of something before
    assert gpu.peak_bytes(call) == 234


@pytest.mark.parametrize(("syncs", "seen", "found"), [(0, True, 0), (3, True, 3), (3, False, 1)])
def test_host_syncs_are_counted_even_without_their_warnings(gpu, syncs, seen, found):
    gpu.api = Api(syncs, seen)
    assert gpu.host_syncs(gpu.api.touch) == found
    assert gpu.api.mode == "default"


def test_another_error_is_no_host_sync(gpu):
    def call():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        gpu.host_syncs(call)
    assert gpu.api.mode == "default"


def test_a_gpu_run_records_every_figure_and_what_fails(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_devices, "driver", lambda: "999.1")
    import aihwkit_lightning.nn.modules.linear as lightning

    monkeypatch.setattr(lightning, "TRITON_AVAIL", False)
    rows = bench.bench(gpu, GPU_SUITE, tmp_path / "rows.jsonl")
    figures = {"step, host", "saved for backward", "saved beyond nn.Linear"}
    figures |= {"peak memory of a step", "host syncs", *GPU_SUITE.modes}
    runs = [c for c in GPU_SUITE.contenders if c.arm != layers.TRITON]
    taken = {(row["what"], rows_of.contender_of(row)) for row in rows if "failed" not in row}
    assert taken == {(what, contender) for what in figures for contender in runs}
    failed = {(row["what"], row["tiles"]) for row in rows if "failed" in row}
    assert failed == {(what, tiles) for what in GPU_SUITE.modes for tiles in (1, 8)}
    assert all("Triton mode" in row["failed"] for row in rows if "failed" in row)
    assert {(row["gpu"], row["driver"], row["dtype"]) for row in rows} == {
        ("imaginary", "999.1", "bfloat16")
    }
    text = rows_of.tables(rows, GPU_SUITE.goals)
    assert "imaginary, driver 999.1" in text and "| not measured |" in text
    assert "lightning, Triton, 8 tiles fails: RuntimeError: AIHWKIT-Lightning finds no GPU" in text
    assert "| host syncs: analogfx, 8 tiles ≤ 0 | 0.00 reached |" in text


def test_what_we_sell_may_not_fail(gpu, monkeypatch, tmp_path):
    def broken(layer, config):
        raise ValueError("no")

    monkeypatch.setitem(layers.ARMS, "analogfx", broken)
    with pytest.raises(ValueError, match="no"):
        bench.bench(gpu, GPU_SUITE, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_saved_bytes_are_set_against_what_a_digital_layer_keeps(data):
    device = types.SimpleNamespace(peak_bytes=lambda call: 0, host_syncs=lambda call: 0)
    subject = layers.Subject(Keeps(), torch.optim.SGD(Keeps().parameters()))
    counted = layers.counted_rows(
        SHAPE, layers.ONE, subject, data._replace(grad=torch.ones(64)), device
    )
    medians = {row["what"]: row["median"] for row in counted}
    assert medians["saved beyond nn.Linear"] == round(100 * 64 / ((4 + 8) * 16), 4)


def test_the_8_bit_mode_quantises_weights():
    config = layers.afm(SHAPE, 1, layers.MODES["8-bit forward"].weight_states)
    assert config.modifier.res == 254 and "CHANNEL" in config.modifier.quantization_type.name
    assert layers.afm(SHAPE, 1) == analogfx.recipes.afm()


def test_lightnings_triton_mode_is_on_in_its_own_forward_only(data, monkeypatch):
    monkeypatch.delenv("AIHWKIT_USE_TRITON", raising=False)
    import aihwkit_lightning.nn.modules.linear as lightning

    monkeypatch.setattr(lightning, "TRITON_AVAIL", True)
    seen = []

    class Stand:
        @staticmethod
        def apply(inp, weights, *rest):
            seen.append(os.environ.get("AIHWKIT_USE_TRITON"))
            return inp @ weights.T

    monkeypatch.setattr(lightning, "TritonLinear", Stand, raising=False)
    subject = layers.triton_arm(nn.Linear(16, 8), layers.afm(SHAPE, 1))
    subject.module(data.x)
    assert seen == ["1"] and "AIHWKIT_USE_TRITON" not in os.environ


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"--device cuda needs a GPU, and torch .* finds none"):
        bench.main(["--device", "cuda"])


def test_arms_can_be_left_out(monkeypatch):
    suites = []
    monkeypatch.setattr(bench, "require_green", lambda *tests: None)
    monkeypatch.setattr(bench, "bench", lambda device, suite, path: suites.append(suite) or [])
    bench.main(["--without", "lightning"])
    assert {c.arm for c in suites[0].contenders} == {layers.DIGITAL, "analogfx"}


def test_tests_can_be_skipped_by_who_has_run_them(monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "require_green", lambda *tests: ran.append(tests))
    monkeypatch.setattr(bench, "bench", lambda device, suite, path: [])
    bench.main(["--skip-tests"])
    assert not ran
    bench.main([])
    assert ran == [bench.TESTS["cpu"]]


def test_a_recurrent_suite_races_layers_that_loop(one_thread):
    suite = dataclasses.replace(
        layers.SUITES["cpu-recurrent"],
        shapes=(rows_of.Sequences(2, 4, 4, 3),), repeats=1, warmup=0,
    )  # fmt: skip
    found = list(layers.measure(suite.shapes[0], suite, CPU))
    assert all("failed" not in row for row in found)
    timed = {(row["what"], row["arm"]) for row in found if row["unit"] == "ms"}
    assert timed == {
        (what, arm)
        for what in ("forward", "step", "noiseless step")
        for arm in ("nn.LSTM", "analogfx", "lightning")
    }
    common = {"date": "2026", "device": "cpu-recurrent"}
    assert {rows_of.shape_of(row | common) for row in found} == {*suite.shapes}
    assert "3 steps of 2 rows, 4 → 4" in rows_of.figure_table(found[:3])


def test_a_suite_of_experts_races_blocks_with_a_router(one_thread):
    shape = rows_of.Routed(5, 16, 24, 4)
    suite = dataclasses.replace(layers.SUITES["cpu-experts"], shapes=(shape,), repeats=1, warmup=0)
    found = list(layers.measure(shape, suite, CPU))
    assert all("failed" not in row for row in found)
    timed = {(row["what"], row["arm"]) for row in found if row["unit"] == "ms"}
    assert timed == {
        (what, arm) for what in ("forward", "step") for arm in ("digital experts", "analogfx")
    }
    assert {rows_of.shape_of(row) for row in found} == {shape}
    assert "5 rows to 2 of 4 experts, 16 → 24" in rows_of.figure_table(found[:2])


def test_the_experts_that_are_raced_are_analog():
    shape = rows_of.Routed(5, 16, 24, 4)
    block = layers.make_layer(shape, CPU)
    subject = layers.analogfx_arm(block, layers.afm(shape, 1))
    report = analogfx.report(subject.module)
    assert report.coverage == 1.0 and {s.kind for s in report.sites if "experts" in s.name}
