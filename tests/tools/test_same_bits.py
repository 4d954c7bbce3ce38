import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import same_bits

HEAD = slice(0, 2)


def cells(row):
    """A row's cells by column; both columns "apart" are told apart by what stands before them."""
    found = dict(zip(("model", "program", "codes", "apart", "rounded", "inputs", "dac apart",
                      "nearest tie", "output off"), row, strict=True))  # fmt: skip
    return {name: cell.replace(",", "") for name, cell in found.items()}


@pytest.fixture(scope="module")
def recorded():
    analog, x = same_bits.model_of("Llama", same_bits.STATES["W4A8"])
    with torch.no_grad():
        return analog, x, *same_bits.eager(analog, x)


def test_every_site_of_eager_is_recorded(recorded):
    analog, x, calls, y = recorded
    with torch.no_grad():
        assert torch.equal(y, analog(x).logits)
    assert len(calls) == 2 * 7 + 1  # two blocks, and the head
    assert {call.spec.inp_res for call in calls} == {254.0}


def tampered(recorded, change):
    """Counts of a program that gives eager PyTorch's outputs but for one, times ``change``."""
    _, _, calls, y = recorded
    seen = [same_bits.Seen(c, c.x, c.y.clone(), c.y) for c in calls]
    call = calls[3]
    number = int(call.y.flatten().abs().argmax())
    step = call.step(call.y).expand_as(call.y).flatten()[number]
    seen[3].y.view(-1)[number] += change(step)
    return same_bits.count(same_bits.Run(seen, y), y)


def test_an_output_that_is_off_by_a_step_is_a_code_apart(recorded):
    found = tampered(recorded, lambda step: step)
    assert (found.apart, found.rounded, found.dac_apart) == (1, 0, 0)


def test_an_output_that_is_off_by_rounding_is_not(recorded):
    found = tampered(recorded, lambda step: step / 1000)
    assert (found.apart, found.rounded) == (0, 1)


def test_an_output_that_is_no_number_is_a_code_apart(recorded):
    assert tampered(recorded, lambda step: step * float("nan")).apart == 1


def test_codes_are_counted_for_every_tile(recorded):
    _, _, calls, y = recorded
    seen = [same_bits.Seen(c, c.x, c.y, c.y) for c in calls]
    rows = 4 * 16  # of 16 tokens in each of 4 texts; tiles have 40 inputs
    per_block = 2 * (48 + 24 + 24 + 48 + 96 + 96) + 3 * 48
    assert same_bits.count(same_bits.Run(seen, y), y).codes == rows * (2 * per_block + 2 * 100)


def test_a_moved_dac_code_is_counted_with_its_distance_from_the_tie(recorded):
    _, _, calls, y = recorded
    call = calls[0]
    moved = call.x.clone()
    step = float(call.rest[2][0]) / 127
    moved.view(-1)[int(call.x.abs().argmin())] += 3 * step
    seen = [same_bits.Seen(call, moved, call.y, call.y)]
    found = same_bits.count(same_bits.Run(seen, y), y)
    assert found.dac_apart == 1 and 0 <= found.nearest <= 0.5


def test_a_file_has_the_codes_of_eager():
    ((row, right),) = same_bits.rows(["ResNet"], ["W4A8"], ["qdq"])
    assert row[HEAD] == ("ResNet W4A8", "qdq") and right
    cell = cells(row)
    assert cell["apart"] == "0" and int(cell["codes"]) > 40_000


def test_a_program_that_is_off_by_a_step_fails_the_command(monkeypatch, capsys):
    def off(analog, x, calls, folder):
        seen = [same_bits.Seen(c, c.x, c.y + c.step(c.y), c.y) for c in calls]
        return same_bits.Run(seen, analog(x).logits)

    monkeypatch.setitem(same_bits.PROGRAMS, "numpy", off)
    arguments = ["--models", "Llama", "--bits", "W4A8", "--programs", "numpy", "--here"]
    assert same_bits.main(arguments) == 1
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("Llama W4A8") and "numpy" in row


def test_every_setting_is_a_process_of_its_own(monkeypatch, capsys):
    called = []
    failing = "nothing"

    def run(command, env):
        called.append((command[2:], env))
        status = int(env.get("ATEN_CPU_CAPABILITY") == failing)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(same_bits.subprocess, "run", run)
    assert same_bits.main(["--models", "ViT", "--programs", "qdq"]) == 0
    assert "Every ADC code is the same." in capsys.readouterr().out
    assert [env.get("ATEN_CPU_CAPABILITY") for _, env in called] == [None, "avx2", "default"]
    assert {env["OMP_NUM_THREADS"] for _, env in called} == {"1", "2"}
    assert all(env["TRITON_INTERPRET"] == "1" for _, env in called)
    assert len({env["TORCHINDUCTOR_CACHE_DIR"] for _, env in called}) == 3
    expected = ["--models", "ViT", "--bits", "W4A8", "W8A8", "--programs", "qdq", "--here"]
    assert all(command == expected for command, _ in called)
    failing = "avx2"
    assert same_bits.main(["--models", "ViT"]) == 1
    assert "FAILED" in capsys.readouterr().out
