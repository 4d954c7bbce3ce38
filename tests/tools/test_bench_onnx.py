import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "tools" / "bench_onnx.py"
SPEC = importlib.util.spec_from_file_location("bench_onnx", PATH)
bench = importlib.util.module_from_spec(SPEC)
sys.modules["bench_onnx"] = bench
SPEC.loader.exec_module(bench)

ENVIRONMENT = {"date": "2020-01-01", "machine": "cpu", "cores": 2, "versions": {"onnx": "1"}}


def row(suite, **fields):
    return {"suite": suite, **fields, **ENVIRONMENT}


def latency(arm, ratio):
    return row("latency", model="m", arm=arm, ms=ratio, p20=ratio, p80=ratio, over_digital=ratio)


def memory(parameters, ratio):
    return row("memory", parameters=parameters, weight_bytes=2**30, verify=False, seconds=3.0,
               extra_bytes=1, extra_over_weights=ratio)  # fmt: skip


ROWS = [
    row("sizes", weights="float32", bytes=1000, parameters=250),
    row("sizes", weights="int8", bytes=250, parameters=250),
    latency("digital", 1.0), latency("fused", 9.9), latency("qdq", 9.9),
    latency("digital", 1.0), latency("fused", 1.4), latency("qdq", 1.1),
    memory(10, 5.0), memory(20, 1.2),
]  # fmt: skip


def test_tables_tell_the_last_run_and_its_goals(tmp_path, monkeypatch):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    rows.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    page.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    monkeypatch.setattr(bench, "ROWS", rows)
    monkeypatch.setattr(bench, "PAGE", page)
    bench.main(["--table"])
    text = page.read_text()
    assert "| int8 | 250 | 0.25 |" in text
    assert "| m | fused | 1.4 (1.4–1.4) | 1.40 | ≤ 1.5: reached |" in text
    assert "| m | qdq | 1.1 (1.1–1.1) | 1.10 | ≤ 1: **missed** |" in text
    assert "| 20 | 1.00 GiB | no | 3.0 | 1.20 | ≤ 1.3: reached |" in text
    assert "9.9" not in text and "old" not in text
    assert text.startswith("before") and text.endswith("after\n")
    bench.main(["--table"])
    assert page.read_text() == text


def test_a_run_that_was_broken_off_is_no_run():
    with pytest.raises(SystemExit, match="latency was broken off"):
        bench.tables([*ROWS[:5], latency("digital", 1.0)])
    with pytest.raises(SystemExit, match="no rows of latency"):
        bench.tables(ROWS[:2])


def test_rows_are_appended_all_or_none(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"

    def fails(folder):
        yield row("fails", figure=1)
        raise ZeroDivisionError

    def runs(folder):
        assert folder.is_dir()
        yield {"suite": "runs"}

    monkeypatch.setattr(bench, "SUITES", {"fails": fails, "runs": runs})
    with pytest.raises(ZeroDivisionError):
        bench.measure("fails", path)
    assert not path.exists()
    bench.measure("runs", path)
    (found,) = map(json.loads, path.read_text().splitlines())
    assert found["suite"] == "runs" and found["versions"]["onnx"]
    with pytest.raises(SystemExit):
        bench.main(["no-such-suite"])
