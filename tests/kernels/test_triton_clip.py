import pytest
import torch
from triton_cases import DEVICE

import analogfx
from analogfx.kernels import clip as plain
from analogfx.kernels.triton import blocks, clip

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]


def matrix(rows=7, columns=21, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(rows, columns, generator=g) + 3).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_rows_are_clipped_as_torch_clips_them(monkeypatch, dtype, small, transposed):
    if small:
        monkeypatch.setattr(blocks, "ROWS", 2)
        monkeypatch.setattr(blocks, "COLUMNS", 8)
    w = matrix(dtype=dtype)
    w = w.t().contiguous().t() if transposed else w
    exact, before = w.cpu().double(), w.clone()
    clip.clip_rows(w, 3.1)
    plain.clip_rows(exact, 3.1)
    assert not torch.equal(w, before)
    torch.testing.assert_close(w.cpu().double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_single_weight_has_no_spread_and_nan_no_bound():
    for w in (matrix(columns=1), matrix(rows=0), matrix(columns=0)):
        before = w.clone()
        clip.clip_rows(w, 0.1)
        assert torch.equal(w, before)
    w = matrix()
    w[2, 3] = float("nan")
    before = w.clone()
    clip.clip_rows(w, 0.1)
    assert torch.equal(w[2].isnan(), before[2].isnan()) and not torch.equal(w[1], before[1])


@pytest.mark.usefixtures("triton")
def test_a_model_is_clipped_by_it_and_torch_counts_the_write():
    layer = torch.nn.Linear(12, 7)
    analog = analogfx.analogize(layer, analogfx.recipes.afm()).to(DEVICE)
    with torch.no_grad():
        analog.weight[:, 0] = 5.0
    expected, version = analog.weight.detach().clone(), analog.weight._version
    analogfx.clip_weights(analog)
    plain.clip_rows(expected, 2.5)
    assert analog.weight._version > version
    torch.testing.assert_close(analog.weight.detach(), expected)
    assert analog.weight.abs().max() < 5.0
