"""The fused convolution of one site with one input tile and one range: no patches are made.

Range, DAC, weights and ADC act element by element around torch's own convolution. Sites that cut
the flattened patch, or take a range from every patch, go through :mod:`analogfx.kernels.linear`
on unfolded patches instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from analogfx.kernels import integers, linear, noise, patches
from analogfx.kernels import reference as ref
from analogfx.kernels.operands import Gradients, Operands
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.weights import maxima, modified_weight, summed_at_once


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _per_channel(v: Tensor, dims: int) -> Tensor:
    """A vector over output channels, shaped to broadcast against an image."""
    return v.view(-1, *[1] * dims)


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the memory format of an image ``x``: channels last where that is."""
    return y.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def out_shape(x: Tensor, weight: Tensor, window: Window, spec: MVMSpec) -> list[int]:
    """Shape of the output.

    Raises:
        RuntimeError: the image, padded, is smaller than the kernel.
    """
    out = window.out_size(list(x.shape[2:]))
    if any(size < 1 for size in out):
        raise RuntimeError(
            f"the kernel {tuple(window.kernel_size)} with dilation {tuple(window.dilation)} is "
            f"larger than the image {tuple(x.shape[2:])} with padding {tuple(window.padding)}"
        )
    return [x.shape[0], weight.shape[0], *out]


def clipped_shape(x: Tensor, weight: Tensor, window: Window, spec: MVMSpec) -> list[int]:
    """Shape of the bits that mark clipped outputs."""
    return out_shape(x, weight, window, spec) if spec.keep and spec.out_bound else [0]


def convolve(
    x: Tensor,
    weight: Tensor,
    window: Window,
    groups: int,
    bias: Tensor | None = None,
    depth: int = 0,
) -> Tensor:
    """torch's convolution, for any number of axes.

    Args:
        depth: for codes, how many products their dtype sums exactly, see ``kernels.integers``.
    """
    if depth and weight[0].numel() > depth and x.dtype != torch.float64:
        return _convolve_in_parts(x, weight, window, groups, depth)
    zeros = [0] * len(window.stride)
    return torch.convolution(
        x, weight, bias, window.stride, window.padding, window.dilation, False, zeros, groups
    )


def _convolve_in_parts(
    x: Tensor, weight: Tensor, window: Window, groups: int, depth: int
) -> Tensor:
    """The exact sum of products of codes that are too many for one convolution."""
    channels, taps = weight.shape[1], weight[0, 0].numel()
    if taps > depth:
        return convolve(x.double(), weight.double(), window, groups).to(x.dtype)
    by_group = x.unflatten(1, (groups, channels))
    spans = list(integers.parts(channels, depth // taps))
    total = None
    for s in spans:
        part = convolve(by_group[:, :, s].flatten(1, 2), weight[:, s], window, groups)
        total = part.double() if total is None else total.add_(part)
    assert total is not None
    return total.to(x.dtype)


def _analog_weight(
    site: Operands, spec: MVMSpec, codes: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The kernel as the tile holds it, and the maximum of each output channel, (1, O)."""
    matrix = _matrix(site.weight)
    rows = spec._replace(groups=1)  # the rows of all groups are one matrix
    peaks = maxima(matrix, site.clip, rows)
    modified = modified_weight(matrix, site.clip, site.seed, peaks, rows, codes)
    return modified.view(site.weight.shape), peaks


def _draw(y: Tensor, seed: Tensor | None, spec: MVMSpec) -> Tensor | None:
    """Output noise in the order of patches, (B, L, O), so that it is that of unfolded patches."""
    if not spec.out_noise:
        return None
    assert seed is not None
    by_patch = (y.shape[0], math.prod(y.shape[2:]), y.shape[1])
    return noise.normal(seed, 1, by_patch, y.dtype).mT.reshape(y.shape)


def forward(site: Operands, window: Window, spec: MVMSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The site's output, the marks of clipped outputs, and the noisy weights.

    Returns:
        ``y`` (B, O, *out) of x's dtype; ``clipped`` uint8 and ``modified``, without elements
        unless the backward keeps them.
    """
    modified, peaks = _analog_weight(site, spec, integers.depth(spec) > 0)
    y, clipped = product(site, modified, peaks, window, spec)
    kept = modified if linear.keeps_weight(site.weight, spec) else site.weight.new_empty(0)
    return y, clipped, kept


def product(
    site: Operands, modified: Tensor, peaks: Tensor | None, window: Window, spec: MVMSpec
) -> tuple[Tensor, Tensor]:
    """The site's output and the marks of clipped outputs, by the weights as the tile holds them.

    Args:
        modified: codes where the site multiplies codes.
        peaks: (1, O), what scales the channels; None where nothing does.
    """
    x, _, bias, input_range, _, seed = site
    dims = x.dim() - 2
    r = None if input_range is None else input_range[0]
    codes = integers.depth(spec) > 0
    peak = None if peaks is None else _per_channel(peaks[0], dims)
    depth = summed_at_once(_matrix(modified), spec) if codes else 0
    bias = None if bias is None else ref.wide(bias)
    inner, outer = (bias, None) if spec.ends_with_product else (None, bias)
    analog_x = linear.converted(x, r, spec, codes)
    y = convolve(analog_x, modified, window, spec.groups, inner, depth)
    y = laid_out(y, x)
    y, bound = linear.tile_output(y, r, peak, _draw(y, seed, spec), spec)
    clipped = torch.empty(0, dtype=torch.uint8, device=x.device)
    if bound is not None:
        if spec.keep:
            clipped = (y.abs() > bound).view(torch.uint8)
        y = ref.clamp_to(y, bound)
    if outer is not None:
        y = y + _per_channel(outer, dims)
    return y.to(x.dtype), clipped


def backward(
    grad: Tensor,
    site: Operands,
    clipped: Tensor,
    modified: Tensor,
    needs: list[bool],
    window: Window,
    spec: MVMSpec,
) -> Gradients:
    """Gradients of :func:`forward`; the arguments are those of ``linear.backward``."""
    x, input_range = site.x, site.input_range
    r = None if input_range is None else input_range[0]
    peaks = None
    if not linear.is_kept(modified):
        modified, peaks = _analog_weight(site, spec)
    analog_x = linear.converted(x, r, spec)
    if spec.out_bound and grad.numel() and not linear.is_kept(clipped):
        y = _product_again(site, analog_x, modified, window, spec)
        peak = None if peaks is None else _per_channel(peaks[0], x.dim() - 2)
        y, bound = linear.tile_output(y, r, peak, _draw(y, site.seed, spec), spec)
        assert bound is not None
        clipped = y.abs() > bound
    return gradients(ref.wide(grad), site, clipped, analog_x, modified, needs, window, spec)


def gradients(
    grad: Tensor,
    site: Operands,
    clipped: Tensor,
    analog_x: Tensor,
    modified: Tensor,
    needs: list[bool],
    window: Window,
    spec: MVMSpec,
) -> Gradients:
    """Gradients by what the tile multiplied.

    Args:
        grad: (B, O, *out), of the dtype that the gradients' products are to have.
        clipped: what a bound clipped; without elements where there is none.
        analog_x, modified: the values behind the DAC and those that the tile held, of ``grad``'s
            dtype: with a learned clip, the precision of the computation.
    """
    x, weight, _, input_range, clip, _ = site
    need_x, need_w, need_bias, need_range, need_clip = needs
    r = None if input_range is None else input_range[0]
    out = Gradients(*(x.new_empty(0) for _ in needs))
    if need_bias:
        of_bias = ref.wide(grad).sum([0, *range(2, grad.dim())])
        out = out._replace(bias=of_bias.to(weight.dtype))
    g = grad.masked_fill(clipped.bool(), 0.0) if clipped.numel() else grad
    grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
        g,
        analog_x,
        modified,
        None,
        window.stride,
        window.padding,
        window.dilation,
        False,
        [0] * len(window.stride),
        spec.groups,
        [need_x or (need_range and spec.range_mode == "fast"), need_w or need_clip, False],
    )
    if need_range:
        assert r is not None
        if spec.range_mode == "fast":
            grad_range = ref.range_grad_fast(grad_x, x, r)
        else:
            wide = ref.wide(g), x, ref.wide(modified)
            grad_range = _range_grad(*wide, r, window, spec)
        out = out._replace(input_range=grad_range.view(1))
    if need_x:
        grad_x = grad_x if r is None else grad_x * ref.inside(x, r)
        out = out._replace(x=laid_out(grad_x.to(x.dtype), x))
    if clip is not None and (need_w or need_clip):
        flat, grad_clip = ref.weight_backward(
            _matrix(grad_w), _matrix(weight), clip[0], spec.weight_states
        )
        grad_w = flat.view(weight.shape)
        out = out._replace(clip=grad_clip.unsqueeze(0).to(clip.dtype))
    if need_w:
        out = out._replace(weight=laid_out(grad_w.to(weight.dtype), weight))
    return out


def _product_again(
    site: Operands, analog_x: Tensor, modified: Tensor, window: Window, spec: MVMSpec
) -> Tensor:
    """The product of the forward: of codes where the site multiplies codes."""
    depth = integers.depth(spec)
    if not depth:
        return convolve(analog_x, modified, window, spec.groups)
    codes, _ = _analog_weight(site, spec, codes=True)
    r = None if site.input_range is None else site.input_range[0]
    analog_x = linear.converted(site.x, r, spec, codes=True)
    return convolve(analog_x, codes, window, spec.groups, None, depth)


def _range_grad(
    g: Tensor, x: Tensor, modified: Tensor, r: Tensor, window: Window, spec: MVMSpec
) -> Tensor:
    """Gradient of a learned static range, (), as if every patch had been clamped by itself.

    The rule keeps the sign of each patch element's gradient, so the image's gradient, a sum over
    patches, is not enough. One kernel offset at a time gives every patch element once without
    ever holding more than an image of them.
    """
    if x.device.type == "cpu" and not ref.saturated(x, r).any():  # no sync in host memory
        nothing = torch.zeros_like(r)
        return ref.range_grad(nothing, nothing, r, spec.decay, spec.input_min_percentage)
    padded, out = patches.pad(ref.wide(x), window), list(g.shape[2:])
    per_group = g.unflatten(1, (spec.groups, -1)).flatten(3)  # (B, groups, O / groups, L)
    kernel = modified.unflatten(0, (spec.groups, -1))
    data, count = torch.zeros_like(r), torch.zeros_like(r)
    for offset in patches.offsets(window):
        seen = patches.shifted(padded, offset, window, out)
        at = kernel[(slice(None),) * 3 + offset].mT  # (groups, C / groups, O / groups)
        patch_grad = _per_group(at, per_group).flatten(1, 2).view(seen.shape)
        beyond = ref.saturated(seen, r)
        data = data + ref.saturation_grad(patch_grad, seen, beyond)
        count = count + beyond.sum()
    share = count / patches.elements(x, window)
    return ref.range_grad(data, share, r, spec.decay, spec.input_min_percentage)


def _per_group(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (groups, A, B) times x (B_, groups, B, L), for depthwise groups without a product."""
    return matrix * x if matrix.shape[-2:] == (1, 1) else torch.matmul(matrix, x)
