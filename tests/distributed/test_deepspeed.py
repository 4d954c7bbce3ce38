"""DeepSpeed's ZeRO, where it is installed; the cases are in ``deepspeed_cases.py``."""

import pytest

pytest.importorskip("deepspeed")

from deepspeed_cases import CASES
from processes import outcomes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes("deepspeed_cases", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes(found, name):
    for rank, results in enumerate(found):
        assert name in results, f"rank {rank} did not come to it: an earlier case failed"
        assert not results[name], f"rank {rank}: {results[name]}"
