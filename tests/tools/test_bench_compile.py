import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # where a command finds its modules
import bench  # noqa: E402
import bench_compile  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


@pytest.fixture
def rows(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(bench_compile, "ROWS", path)
    return path


@pytest.fixture
def eager(monkeypatch):
    """Compilers that compile nothing, and with which a peer fails."""
    original = torch.compile

    def compile(model, backend, options=None):
        def fails(*_):
            raise RuntimeError("does not compile")

        if "lightning" in type(next(iter(model.children()))).__module__:
            return fails
        if backend == "inductor":
            return model
        return original(model, backend=backend, options={**(options or {}), "compiler": "eager"})

    monkeypatch.setattr(bench_compile.torch, "compile", compile)
    monkeypatch.setattr(bench_compile, "warm_up", lambda: None)


def small():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4))


CASES = {
    "small": bench_compile.Case(small, (3, 8)),
    "noise": bench_compile.Case(small, (3, 8), bench_compile.weight_noise_alone, whole=False),
}


def test_a_run_keeps_and_shows_every_arm(rows, eager):
    shown = bench_compile.bench(CASES, repeats=2)
    recorded = [json.loads(line) for line in rows.read_text().splitlines()]
    arms = {
        (m, w): {r["arm"]: r for r in recorded if (r["model"], r["what"]) == (m, w)}
        for m, w in {(r["model"], r["what"]) for r in recorded}
    }
    kinds = {f"{who} {how}" for who in ("digital", "analogfx", "lightning")
             for how in ("eager", "compiled")}  # fmt: skip
    passes = {"skip_dropout": 1, "freeze": 2, "epilogue": 1, "skip_conversion": 1}
    whole = arms["small", "eval forward"]
    assert whole.keys() == kinds | {f"without {name}" for name in (*passes, "all")}
    assert {n: c for n, c in whole["analogfx compiled"]["passes"].items() if c} == passes
    assert "freeze" not in whole["without freeze"]["passes"]
    assert arms["small", "step"].keys() == kinds
    noise = arms["noise", "eval forward"]
    assert noise["analogfx compiled"]["passes"]["skip_identity"] == 2
    assert "lightning eager" not in noise and ("noise", "step") not in arms
    failed = [row for row in recorded if "failed" in row]
    assert {row["arm"] for row in failed} == {"lightning compiled"}
    assert all(r["ratio"] > 0 and r["repeats"] == 2 for r in recorded if "failed" not in r)

    assert shown.count("fails: RuntimeError: does not compile") == 2
    assert "| skip_dropout 1, freeze 2, epilogue 1, skip_conversion 1 |" in shown
    (line,) = (n for n in shown.splitlines() if n.startswith("| without epilogue |"))
    assert line.endswith("| epilogue 1 |")


def row(what, ratio, first_call):
    figures = {"ratio": ratio, "first_call_ratio": first_call}
    return {"model": "m", "whole": True, "what": what, "arm": "analogfx compiled", **figures}


def test_the_goals_are_held_against_the_whole_models():
    rows = [row("eval forward", 1.05, 1.6), row("step", 1.4, 1.5)]
    lines = bench_compile._goals([*rows, rows[0] | {"whole": False, "model": "small"}]).splitlines()
    assert lines[0] == "| analog compiled, of digital compiled | goal | m |"
    assert [line.split("| ")[-1] for line in lines[2:]] == [
        "×1.05 met |", "×1.40 missed |", "×1.60 missed |", "×1.50 met |",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n, case in bench_compile.CASES.items() if not case.whole])
def test_cases_for_passes_are_ones_in_which_passes_change_something(name, eager):
    case = bench_compile.CASES[name]
    arm = bench_compile.make_arms(case, training=False)["analogfx compiled"]
    bench_compile.forward(arm, torch.randn(case.shape))
    fired = {n for n, count in bench_compile.analogfx.report(arm.model).passes.items() if count}
    expected = {
        "feed-forward, 16 rows": {"skip_dropout", "freeze", "epilogue", "skip_conversion"},
        "gated convolution": {"freeze", "convert_once"},
        "Llama block, 4 rows": {"freeze", "share_input", "epilogue"},
        "GPT-2 small block, weight noise alone": {"skip_identity", "skip_dropout"},
    }
    assert fired == expected[name]


def test_the_page_has_the_section_that_the_command_writes(rows, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "compile.md").read_text())
    monkeypatch.setattr(bench_compile, "PAGE", page)
    bench.main(["--compile", "--table"])
    assert "No run is recorded yet." in page.read_text()


def test_arms_start_from_the_same_weights_and_closed_ranges(eager):
    arms = bench_compile.make_arms(CASES["small"], training=True)
    digital = arms["digital eager"].model[0].weight
    for name, arm in arms.items():
        assert (arm.model[0].weight == digital).all(), name
        if not name.startswith("digital"):
            assert arm.model[0].input_range_update_idx.item() == bench_compile.BATCHES_FOR_RANGES
