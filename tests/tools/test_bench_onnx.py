import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_onnx as bench
import tables

ENVIRONMENT = {
    "date": "2020-01-01",
    "commit": "abc1234",
    "cpu": "a processor",
    "cores": 2,
    "versions": {"onnx": "1"},
}


def row(suite, **fields):
    return {"suite": suite, **fields, **ENVIRONMENT}


def latency(arm, ratio):
    times = dict.fromkeys(("ms", "least", "p20", "p80", "over_digital"), ratio)
    return row("latency", model="m", arm=arm, **times, least_over_digital=ratio - 0.1)


def memory(parameters, ratio):
    return row("memory", parameters=parameters, weight_bytes=2**30, states=0, level="fused",
               verify=False, seconds=3.0, extra_bytes=1, extra_over_weights=ratio)  # fmt: skip


ROWS = [
    row("sizes", weights="float32", bytes=1000, parameters=250),
    row("sizes", weights="int8", bytes=250, parameters=250),
    latency("digital", 1.0), latency("fused", 9.9), latency("qdq", 9.9),
    latency("digital", 1.0), latency("fused", 1.4), latency("qdq", 1.1),
    memory(10, 5.0), memory(20, 1.2),
    row("ties", level="fused", values=1000, at_ties=20, apart=3),
]  # fmt: skip


def test_tables_tell_the_last_run_and_its_goals(tmp_path, monkeypatch):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    rows.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    page.write_text(f"before\n<!-- {bench.COMMAND} -->\nold\n{tables.END}\nafter\n")
    monkeypatch.setattr(bench, "ROWS", rows)
    monkeypatch.setattr(bench, "PAGE", page)
    bench.main(["--table"])
    text = page.read_text()
    assert "| int8 | 250 | 0.25 |" in text
    assert "| m | fused | 1.4 (1.4–1.4) | 1.4 | 1.40 | 1.30 | ≤ 1.5: reached |" in text
    assert "| m | qdq | 1.1 (1.1–1.1) | 1.1 | 1.10 | 1.00 | ≤ 1: **missed** |" in text
    assert "| 20 | 1.00 GiB | fused, no states | no | 3.0 | 1.20 | ≤ 1.3: reached |" in text
    assert "| fused | 1,000 | 20 | 3 |" in text
    assert "2020-01-01, commit abc1234: a processor, 2 cores; onnx 1." in text
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
    assert found["commit"] and found["cpu"]
    with pytest.raises(SystemExit):
        bench.main(["no-such-suite"])


def test_ties_are_counted_only_if_named(monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "measure", lambda name, path: ran.append(name))
    bench.main([])
    assert ran == ["sizes", "latency", "memory"]
