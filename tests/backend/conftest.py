import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_start(fresh_dynamo, one_thread):
    torch.manual_seed(0)
