import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import sharding
from sharding import LLAMA_70B, SMALL

ROOT = Path(__file__).resolve().parents[2]
DATA, TENSOR = 128, 8


@pytest.fixture(scope="module")
def counted():
    """In a process of its own, as a process has one default group."""
    pytest.importorskip("transformers")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tools" / "sharding.py"), "--count"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_parts_of_a_block_are_those_of_the_table(counted):
    expected = sharding.held(LLAMA_70B, DATA, TENSOR)
    assert counted["held"] == {name: expected[name] for name in counted["held"]}


def test_an_analog_model_sends_as_often_as_a_digital_one_and_twice_a_step(counted):
    for digital, analog in zip(counted["digital"], counted["analog"], strict=True):
        assert analog["passes"] == digital["passes"]
        assert len(digital["step"]) == 0 and len(analog["step"]) == 2
    one, two = (found["passes"] for found in counted["analog"])
    assert two - one == 3 + 7  # of FSDP2, and of tensor parallelism


def test_a_step_sends_the_bytes_of_the_table(counted):
    of_block = sharding.sent(SMALL, DATA, TENSOR)
    for blocks, found in enumerate(counted["analog"], 1):
        assert found["step"] == [blocks * of_block["statistics"], blocks * of_block["clip"]]


def test_a_llama_of_70_billion_parameters_has_12_176_ranges():
    shapes = LLAMA_70B.layers().values()
    ranges = sum(inputs // 512 for _, inputs in shapes)
    assert 80 * ranges + 8192 // 512 == 12_176
    assert sum(out * inputs for out, inputs in shapes) == 855_638_016
    page = (ROOT / "docs" / "sharding.md").read_text()
    sent = 80 * sharding.sent(LLAMA_70B, 1024, 1)["statistics"]
    assert re.search(r"([0-9]+) KB a step", page)[1] == str(round(sent / 1e3))


def test_the_page_shows_the_tables():
    page = (ROOT / "docs" / "sharding.md").read_text()
    for table in sharding.tables():
        assert table in page
