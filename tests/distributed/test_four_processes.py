"""FSDP2 with tensor parallelism, and HSDP: four processes; see ``four_process_cases.py``."""

import pytest
import torch.distributed
from four_process_cases import CASES
from processes import outcomes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes("four_process_cases", tmp_path_factory.mktemp("ranks"), world=4)


@pytest.mark.parametrize("name", CASES)
def test_four_processes(found, name):
    for rank, results in enumerate(found):
        assert name in results, f"rank {rank} did not come to it: an earlier case failed"
        assert not results[name], f"rank {rank}: {results[name]}"
