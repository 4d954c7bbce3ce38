import json
import sys
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # where a command finds its modules
import bench  # noqa: E402
import bench_compile  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rows(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(bench_compile, "ROWS", path)
    return path


@pytest.fixture
def eager(monkeypatch):
    """Compilers that do nothing, and with which a peer fails."""

    def compile(model, backend=None, **_):
        def fails(*_):
            raise RuntimeError("does not compile")

        return fails if "lightning" in type(next(iter(model.children()))).__module__ else model

    monkeypatch.setattr(bench_compile.torch, "compile", compile)
    monkeypatch.setattr(bench_compile, "warm_up", lambda: None)


def small():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_run_keeps_and_shows_every_arm(rows, eager):
    shown = bench_compile.bench({"small": bench_compile.Case(small, (3, 8))}, repeats=2)
    recorded = [json.loads(line) for line in rows.read_text().splitlines()]
    arms = {row["arm"] for row in recorded if row["what"] == "eval forward"}
    kinds = {f"{who} {how}" for who in ("digital", "analogfx", "lightning")
             for how in ("eager", "compiled")}  # fmt: skip
    assert arms == kinds | {
        "without skip_identity", "without freeze", "without share_input", "without epilogue",
        "without skip_conversion", "without all",
    }  # fmt: skip
    failed = [row for row in recorded if "failed" in row]
    assert {row["arm"] for row in failed} == {"lightning compiled"}
    assert shown.count("fails: RuntimeError: does not compile") == 2
    assert all(r["ratio"] > 0 and r["repeats"] == 2 for r in recorded if "failed" not in r)


def test_the_page_has_the_section_that_the_command_writes(rows, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "compile.md").read_text())
    monkeypatch.setattr(bench_compile, "PAGE", page)
    bench.main(["--compile", "--table"])
    assert "No run is recorded yet." in page.read_text()


def test_arms_start_from_the_same_weights_and_closed_ranges(eager):
    arms = bench_compile.make_arms(bench_compile.Case(small, (3, 8)), training=True)
    digital = arms["digital eager"].model[0].weight
    for name, arm in arms.items():
        assert (arm.model[0].weight == digital).all(), name
        if not name.startswith("digital"):
            assert arm.model[0].input_range_update_idx.item() == bench_compile.BATCHES_FOR_RANGES
