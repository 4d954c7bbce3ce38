import pytest
import torch
from triton_cases import DEVICE

from analogfx.kernels import statistics as plain
from analogfx.kernels.triton import blocks, statistics

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]


def state(tiles):
    fresh = torch.full((tiles,), 3.0), torch.zeros(tiles, dtype=torch.int64)
    return (*fresh, torch.full((tiles,), -1e-5), torch.full((tiles,), 1e-5))


def both(batches, mode, sizes, momentum=0.9, limit=2, dtype=torch.float32):
    settings = mode, 1, list(sizes), None, limit, 2.0, momentum
    ours, torchs = tuple(t.to(DEVICE) for t in state(len(sizes))), state(len(sizes))
    for x in batches:
        ours = statistics.update_range(x.to(dtype).to(DEVICE), *ours, *settings)
        torchs = plain.update_range(x.to(dtype).double(), *torchs, *settings)
    return ours, torchs


@pytest.mark.parametrize(("mode", "momentum"), [("static", 0.9), ("fast", 0.9), ("fast", -1)])
@pytest.mark.parametrize("sizes", [(7,), (3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [True, False])
def test_it_is_torchs(monkeypatch, mode, momentum, sizes, dtype, small):
    monkeypatch.setattr(statistics, "STRIPS", 2)
    if small:  # several blocks along both axes
        monkeypatch.setattr(blocks, "ROWS", 2)
        monkeypatch.setattr(blocks, "COLUMNS", 2)
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 3, 7, generator=g) * (i + 1) + 100 for i in range(3)]
    ours, torchs = both(batches, mode, sizes, momentum, dtype=dtype)
    for found, expected in zip(ours, torchs, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-6, atol=0)
    assert ours[1].tolist() == [2] * len(sizes)  # the third batch was one too many


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 4)])
def test_few_rows(shape):
    for mode in ("static", "fast"):
        ours, torchs = both([torch.arange(4.0).expand(shape)], mode, (2, 2))
        for found, expected in zip(ours, torchs, strict=True):
            torch.testing.assert_close(found.cpu(), expected)


def test_a_single_element_has_no_deviation():
    ours, _ = both([torch.ones(1, 1)], "static", (1,))
    assert ours[0] == 3.0 and ours[1] == 0


def test_constant_inputs_are_not_counted_and_a_batch_with_nan_is_left_out():
    ours, torchs = both([torch.full((9, 4), 0.3)], "static", (2, 2))
    assert ours[1].tolist() == torchs[1].tolist() == [0, 0]
    x = torch.ones(5, 4)
    x[3, 1] = float("nan")
    ours, torchs = both([x], "fast", (2, 2))
    assert ours[0].isfinite().all()
    torch.testing.assert_close(ours[0].cpu(), torchs[0])
    assert ours[1].tolist() == torchs[1].tolist() == [0, 1]
    for mode in ("static", "fast"):  # nor does one that no model makes
        ours, torchs = both(
            [torch.randn(5, 4) * torch.tensor([1.0, 1.0, 2e34, 2e34])], mode, (2, 2)
        )
        assert ours[1].tolist() == torchs[1].tolist() == [1, 0]
    ours, torchs = both([x], "static", (2, 2))
    assert ours[0].tolist() == torchs[0].tolist() == [3.0, 3.0]
