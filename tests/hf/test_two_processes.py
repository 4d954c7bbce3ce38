"""Trainer on two processes; the cases are in ``trainer_cases.py``."""

import pytest
import torch.distributed

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from processes import outcomes
from trainer_cases import CASES

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes("trainer_cases", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes(found, name):
    for rank, results in enumerate(found):
        assert name in results, f"rank {rank} did not come to it: an earlier case failed"
        assert not results[name], f"rank {rank}: {results[name]}"
