"""What every test shares: how hypothesis draws, and the summary of the parity tests."""

import os
import sys

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton
# is imported: AIHWKIT-Lightning, the oracle, imports it. `TRITON_INTERPRET=0` compiles instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch._dynamo
import torch._inductor
from hypothesis import settings


class WithoutLightning:
    """Skips what imports AIHWKIT-Lightning where it is not installed, as on a bare GPU machine."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "aihwkit_lightning":
            pytest.skip("AIHWKIT-Lightning is not installed", allow_module_level=True)


sys.meta_path.append(WithoutLightning)  # the last one: it is asked for what no other finds

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
def fresh_dynamo():
    """No graphs of other tests, which count for Dynamo's limit of graphs for one function.

    Nor of other versions of the ops: those in Inductor's cache would be taken for ours.
    """
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
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
    oracle = sys.modules.get("oracle")  # a machine without AIHWKIT-Lightning has none
    if oracle and (line := oracle.summary()):
        terminalreporter.write_line(line)
