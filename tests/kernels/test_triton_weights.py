import pytest
import torch
from triton_cases import DEVICE, SEED, philox_normal

from analogfx.kernels import weights as plain
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks, weights

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, in the interpreter
]

SIZES = [(13,), (5, 4, 4)]


def matrix(sizes, outputs=7, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return (0.3 * torch.randn(outputs, sum(sizes), generator=g)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [True, False])
def test_maxima_are_exact(monkeypatch, sizes, dtype, small):
    if small:  # several blocks along both axes
        monkeypatch.setattr(blocks, "ROWS", 2)
        monkeypatch.setattr(blocks, "COLUMNS", 2)
    spec = MVMSpec(list(sizes), [7], noise_std=0.1)
    w = matrix(sizes, dtype=dtype)
    assert torch.equal(weights.maxima(w, None, spec), plain.maxima(w, None, spec))
    w[2, 3] = float("nan")
    assert torch.equal(weights.maxima(w, None, spec).isnan().cpu(), row_of_nan(sizes))


def row_of_nan(sizes):
    expected = torch.zeros(len(sizes), 7, dtype=torch.bool)
    expected[0, 2] = True
    return expected


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("elements", [2048, 8])
def test_weight_noise_is_philox_by_element(monkeypatch, sizes, elements):
    monkeypatch.setattr(blocks, "ELEMENTS", elements)  # rows longer and shorter than a block
    spec = MVMSpec(list(sizes), [7], noise_std=1.0)
    w, seed = matrix(sizes).mul_(0.0), torch.tensor(SEED)
    ones = torch.ones(len(sizes), 7, device=DEVICE)
    drawn = weights.modified_weight(w, None, seed.to(DEVICE), ones, spec)
    expected = philox_normal(seed, 0, w.shape, torch.float32)
    torch.testing.assert_close(drawn.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fields", [
    {"weight_states": 14.0}, {"weight_states": 13.0, "weight_per_channel": True},
    {"weight_states": 14.0, "noise_std": 0.1, "noise_per_channel": True}, {},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modified_weights(monkeypatch, fields, clipped, dtype):
    sizes = SIZES[1]
    per_channel = clipped or fields.get("weight_per_channel", False)
    spec = MVMSpec(list(sizes), [4, 3], **{**fields, "weight_per_channel": per_channel})
    w, seed = matrix(sizes, dtype=dtype), torch.tensor(SEED)
    w[1] = 0.0
    clip = torch.full((3, 7), 0.25, device=DEVICE) if clipped else None
    if clip is not None:
        clip[0, 2], clip[1, 3] = 0.0, -0.3
    peaks = weights.maxima(w, clip, spec)
    found = weights.modified_weight(w, clip, seed.to(DEVICE), peaks, spec)
    monkeypatch.setattr(plain.noise, "normal", philox_normal)
    on_cpu = None if clip is None else clip.cpu().double()
    exact = w.cpu().double()
    exact = plain.modified_weight(exact, on_cpu, seed, plain.maxima(exact, on_cpu, spec), spec)
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert (found is w) == (not fields and not clipped)
