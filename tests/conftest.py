"""What every test shares: how hypothesis draws, and the summary of the parity tests."""

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton
# is imported: the oracle imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import oracle
import pytest
from hypothesis import settings

# The same examples on every machine and in every run: what is red stays red until it is mended.
# `pytest --hypothesis-profile=default` draws others.
settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, report_multiple_bugs=False
)
settings.load_profile("ci")


@pytest.fixture
def one_thread():
    """Torch on one core: with tensors this small the others only wait, and in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo(one_thread):
    """No graphs of other tests, which count for Dynamo's limit of graphs for one function."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def pytest_addoption(parser):
    parser.addoption(
        "--full-matrix",
        action="store_true",
        help="every case of tests/onnx/test_matrix.py (704, about 40 minutes on one core) and of "
        "tests/test_compile.py (252)",
    )


def pytest_terminal_summary(terminalreporter):
    if line := oracle.summary():
        terminalreporter.write_line(line)
