import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo(one_thread):
    """No graphs of other tests, which count for Dynamo's limit of graphs for one function."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
