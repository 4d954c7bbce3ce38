import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import analogfx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import gpu_run  # noqa: E402
from gpu_run import Run, Step  # noqa: E402


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, True, dict(os.environ))


def python(code):
    return lambda run: [[sys.executable, "-c", code]]


SAYS = 'print(\'noise\'); print(\'{"step": "a", "what": "x"}\')'


# ---------------------------------------------------------------------------------- rehearsal


def test_a_rehearsal_counts_launches_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "tools" / "gpu_run.py"), "--rehearse"]
    command += ["--out", str(tmp_path), "--minutes", "5"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def rehearse(*steps):
        return subprocess.run(
            [*command, "--only", *steps],
            cwd=tmp_path,  # not the checkout: it is found without being installed
            env=environment,
            capture_output=True,
            text=True,
        )

    first = rehearse("launches")
    assert first.returncode == 0, first.stdout + first.stderr
    rows = gpu_run.read(tmp_path / "figures.jsonl")
    of_step = {row["tiles"]: row for row in rows if row["what"] == "launches of a step"}
    assert {row["ours"] for row in of_step.values()} == {14}
    kernels = {row["kernel"] for row in rows if row["what"] == "launch"}
    assert {"linear_forward", "clamp_gradient", "linear_backward_weight"} <= kernels
    second = rehearse("launches", "ncu")
    assert second.returncode == 0, second.stdout + second.stderr
    tried = [row["step"] for row in gpu_run.read(tmp_path / "results.jsonl")]
    assert tried == ["launches", "ncu"]
    text = tmp_path.joinpath("report.md").read_text()
    assert (
        text.startswith("# A rehearsal: its figures mean nothing") and "| launches | ok |" in text
    )


# --------------------------------------------------------------------------------------- steps


def test_figures_and_all_else_are_kept(run):
    row = gpu_run.execute(Step("a", 20, python(SAYS)), run, 20)
    assert (row["status"], row["codes"]) == ("ok", [0])
    assert gpu_run.read(run.figures) == [{"step": "a", "what": "x"}]
    assert run.log.read_text().startswith("==== a\nnoise\n")


def test_a_fault_ends_its_step_and_what_it_found_is_kept(run):
    row = gpu_run.execute(Step("a", 20, python(SAYS + "; import os; os.abort()")), run, 20)
    assert row["status"] == "failed" and row["codes"] != [0]
    assert len(gpu_run.read(run.figures)) == 1


def test_a_step_beyond_its_time_is_killed_and_what_it_found_is_kept(run):
    code = "import time; " + SAYS + "; import sys; sys.stdout.flush()"
    row = gpu_run.execute(Step("a", 1, python(code + "; time.sleep(60)")), run, 3)
    assert (row["status"], row["codes"]) == ("cut", [None])
    assert row["seconds"] < 30
    assert len(gpu_run.read(run.figures)) == 1


def test_what_a_machine_lacks_is_no_failure(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    row = gpu_run.execute(
        Step("ncu", 1, gpu_run.sanitized("memcheck")), run._replace(rehearse=False), 1
    )
    assert row["status"] == "absent" and "compute-sanitizer is not installed" in row["reason"]


def test_a_step_that_cannot_begin_fails_alone(run):
    row = gpu_run.execute(Step("ncu", 1, gpu_run.profiled), run, 1)
    assert row["status"] == "failed" and "has found no kernels" in row["reason"]


def test_the_slowest_kernels_are_profiled(run, monkeypatch):
    times = {"a": 3.0, "b": 9.0, "c": 5.0, "d": 1.0}
    lines = [{"what": "launch", "kernel": name, "us": us} for name, us in times.items()]
    run.figures.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(gpu_run, "_tool", lambda run, *command: list(command))
    (command,) = gpu_run.profiled(run)
    assert "regex:^(b|c|a)$" in command and command[:2] == ["ncu", "--clock-control"]


def test_only_what_is_done_or_cannot_be_is_not_tried_again(run):
    of = {"a": "ok", "b": "absent", "c": "failed", "d": "cut"}
    run.results.write_text(
        "".join(json.dumps({"step": s, "status": status}) + "\n" for s, status in of.items())
    )
    assert gpu_run.done(run) == {"a", "b"}


# ------------------------------------------------------------------------------------- showing


def test_goals_come_from_the_last_figure_of_each(run):
    row = {"what": "step", "unit": "ms", "rows": 8, "inputs": 4, "outputs": 4, "p20": 1.0,
           "p80": 1.0, "date": "2026-01-01", "commit": "c", "gpu": "g", "driver": "d", "cuda": "1",
           "triton": "3", "cpu": "p", "cores": 1, "threads": 1, "dtype": "bfloat16",
           "config": "afm", "analogfx": "0", "aihwkit-lightning": None, "torch": "2",
           "python": "3"}  # fmt: skip
    digital = row | {"arm": "nn.Linear", "tiles": 0, "median": 1.0}
    rows = [digital, *(row | {"arm": "analogfx", "tiles": 1, "median": m} for m in (3.0, 1.05))]
    run.rows.write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = gpu_run.goals(run)
    assert "| step: analogfx, 1 tile ≤ 1.1 × nn.Linear | 1.05 reached |" in text
    assert "not measured" in text


def test_steps_have_names_of_their_own_and_the_risky_one_is_last():
    names = [step.name for step in gpu_run.STEPS]
    assert len(set(names)) == len(names) and names[-1] == "bench, Lightning's Triton"


def test_the_checkout_has_its_version_and_its_backend_without_being_installed(tmp_path):
    found = "d = importlib.metadata.distribution('analogfx'); print(d.version, *d.entry_points)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import importlib.metadata; {found}"],  # no site-packages
        env={**os.environ, "PYTHONPATH": str(gpu_run.checkout_as_package(tmp_path))},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(analogfx.__version__)
    assert "name='analogfx', value='analogfx.backend.compiler:backend'" in done.stdout
    assert "torch_dynamo_backends" in done.stdout
