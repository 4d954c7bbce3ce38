import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_chip

from analogfx import chip

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = {"PCMLikeNoiseModel": chip.PCMLikeNoiseModel, "Foundation": chip.FoundationNoiseModel}


def test_a_run_keeps_and_shows_a_row_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_chip, "ROWS", tmp_path / "rows.jsonl")
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- {bench_chip.COMMAND} -->\n<!-- end -->\nafter")
    monkeypatch.setattr(bench_chip, "PAGE", page)
    shown = bench_chip.bench(MODELS, size=64, batch=2, repeats=1)
    rows = bench_chip.latest()
    assert [row["model"] for row in rows] == list(MODELS)
    # A pair of devices draws for programming, drift and reading; the other model programs one.
    assert [row["normals"] for row in rows] == [6 * 64**2, 64**2]
    assert all(row[arm] > 0 for row in rows for arm in ("at", "draws", "inside", "outside"))
    assert all(8 <= row["bytes"] < 9 for row in rows)  # the targets and one reading, in float32
    monkeypatch.setattr(sys, "argv", ["bench_chip", "--table"])
    bench_chip.main()
    assert page.read_text() == (
        f"before\n<!-- {bench_chip.COMMAND} -->\n\n{shown}\n\n<!-- end -->\nafter"
    )


def test_goals_that_are_missed_are_marked():
    common = {"date": "2026-01-01", "commit": "c", "cpu": "p", "cores": 1, "threads": 1,
              "torch": "t", "size": 10, "batch": 1, "repeats": 1}  # fmt: skip
    times = {"at": 60.1, "draws": 10.0, "aihwkit": 120.2, "inside": 1.0, "outside": 1.0}
    row = common | {"model": "M", "normals": 200, "bytes": 12.0} | times
    line = bench_chip.table([row]).splitlines()[-1]
    assert line == "| `M` | 2 | 60 | ×6.0 **missed** | ×0.50 | ×1.00 | 12.0 |"


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
def test_what_the_peer_does_is_a_reading_too():
    pytest.importorskip("aihwkit")
    weight = torch.randn(4, 4)
    for name in bench_chip.MODELS:
        call = bench_chip.peer(name, weight)
        assert call is None or call().shape == weight.shape
