import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Products this small take six times as long on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
