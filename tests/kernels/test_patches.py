import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from analogfx.kernels import patches
from analogfx.kernels.patches import Window

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def windows_and_images(draw, least=1, most=3, dtype=torch.float64):
    """A window and an image that at least one patch of it fits."""
    axes = []
    for _ in range(draw(st.integers(least, most))):
        k, s, p, d = (
            draw(st.integers(low, high)) for low, high in ((1, 3), (1, 3), (0, 3), (1, 3))
        )
        smallest = max(1, d * (k - 1) + 1 - 2 * p)
        axes.append((k, s, p, d, draw(st.integers(smallest, smallest + 4))))
    kernel, stride, padding, dilation, size = map(list, zip(*axes, strict=True))
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    offset = draw(st.sampled_from([0.0, 3.0, -50.0]))
    x = offset + torch.randn(batch, channels, *size, generator=generator, dtype=dtype)
    return Window(kernel, stride, padding, dilation), x


@given(windows_and_images(2, 2))
def test_unfold_is_torchs(drawn):
    window, x = drawn
    expected = F.unfold(x, window.kernel_size, window.dilation, window.padding, window.stride)
    assert torch.equal(patches.unfold(x, window), expected.mT)


@given(windows_and_images())
def test_a_product_of_patches_is_a_convolution(drawn):
    window, x = drawn
    kernel = torch.randn(4, x.shape[1], *window.kernel_size, dtype=x.dtype)
    dims = len(window.stride)
    expected = CONVOLVE[dims](x, kernel, None, window.stride, window.padding, window.dilation)
    rows = patches.unfold_batched(x, *window)
    y = patches.fold_output(rows @ kernel.flatten(1).T, x, *window)
    assert list(y.shape[2:]) == window.out_size(list(x.shape[2:]))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)


def test_unfold_is_differentiable():
    window = Window([2, 3], [2, 1], [1, 1], [1, 2])
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: patches.unfold(x, window), x)


@given(windows_and_images())
def test_std_is_that_of_the_patches(drawn):
    window, x = drawn
    rows = patches.unfold(x, window)
    if rows.numel() < 2:
        assert patches.std(x, window).isnan()
    else:
        # An error of sums over n elements, relative to the largest of them.
        scale = float(rows.abs().amax())
        torch.testing.assert_close(
            patches.std(x, window), rows.std(), rtol=1e-12, atol=1e-12 * scale
        )


@given(windows_and_images(dtype=torch.float32))
def test_extremes_are_those_of_the_patches(drawn):
    window, x = drawn
    rows = patches.unfold(x, window)
    assert patches.extremes(x, window) == tuple(rows.aminmax())


@given(windows_and_images())
def test_elements_and_multiplicity_count_patch_elements(drawn):
    window, x = drawn
    assert patches.elements(x, window) == patches.unfold(x, window).numel()
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    weight = patches.multiplicity(x, window)
    assert weight.sum() == patches.unfold(ones, window).sum()
    assert weight.shape == x.shape[2:]


@given(windows_and_images())
def test_shifted_is_one_column_of_the_patches(drawn):
    window, x = drawn
    out = window.out_size(list(x.shape[2:]))
    padded = patches.pad(x, window)
    columns = [
        patches.shifted(padded, offset, window, out).flatten(2)
        for offset in patches.offsets(window)
    ]
    stacked = torch.stack(columns, dim=2).flatten(1, 2)  # (B, C * offsets, L)
    assert torch.equal(stacked.mT, patches.unfold(x, window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_images_are_float32(dtype):
    window = Window([3], [1], [1], [1])
    x = torch.randn(2, 3, 64).to(dtype)
    rows = patches.unfold(x, window).float()
    std, (low, high) = patches.std(x, window), patches.extremes(x, window)
    assert {std.dtype, low.dtype, high.dtype} == {torch.float32}
    torch.testing.assert_close(std, rows.std())
    assert (low, high) == tuple(rows.aminmax())


def test_an_image_without_a_batch_axis():
    window = Window([2, 2], [1, 1], [0, 0], [1, 1])
    x = torch.randn(3, 4, 5)
    assert torch.equal(patches.unfold_batched(x, *window), patches.unfold(x[None], window))
    y = torch.randn(1, 12, 7)
    assert patches.fold_output(y, x, *window).shape == (7, 3, 4)
    assert patches.fold_output(y, x[None], *window).shape == (1, 7, 3, 4)
    assert patches.with_batch(x, 2).shape == (1, 3, 4, 5)
    assert patches.with_batch(x[None], 2).shape == (1, 3, 4, 5)
    assert patches.like_batch(x[None], x, 2).shape == (3, 4, 5)
    assert patches.like_batch(x[None], x[None], 2).shape == (1, 3, 4, 5)


def test_counts_of_patches_of_ever_new_lengths_are_not_kept():
    window = Window([3], [1], [1], [1])
    patches.multiplicity(torch.empty(1, 1, 999), window)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for length in range(5_000, 5_040):
            patches.multiplicity(torch.empty(1, 1, length, device="meta"), window)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000  # one number kept for each position is more than a megabyte
