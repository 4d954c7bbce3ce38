"""Training and verbs on two processes; the cases are in ``distributed_cases.py``."""

import pytest
import torch.distributed
from distributed_cases import CASES
from processes import outcomes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes("distributed_cases", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes(found, name):
    for rank, results in enumerate(found):
        assert name in results, f"rank {rank} did not come to it: an earlier case failed"
        assert not results[name], f"rank {rank}: {results[name]}"
