"""What a site may give for an input, whoever computes it.

A product of floats may be summed in any order, so it is an interval. The converters behind it never
fall where their input rises, and nor does the sum over tiles; so a site's output is an interval,
too, whose ends are apart by rounding, or at a tie of an ADC by its step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analogfx.kernels import reference as ref
from analogfx.kernels.conv import convolve
from analogfx.kernels.spec import scalars
from analogfx.onnx.sites import Programmed

_OTHER_ROUNDINGS = 8
"""Roundings of a product beside those of its sum: scales of codes, and this module's own."""


@torch.no_grad()
def interval(
    site: Programmed, x: Tensor, bias: Tensor | None, integer: bool = False
) -> tuple[Tensor, Tensor]:
    """The least and the largest output of a site.

    Args:
        x: its input, (..., G I), or an image (B, C, ...), in host memory.
        bias: (O,), or None.
        integer: it may be computed by kernels whose codes end where the ADC's do.

    Returns:
        Two tensors of the output's shape and of x's dtype.
    """
    compute = _linear if site.call.window is None else _convolution
    low, high = compute(site, ref.wide(x), _unrounded(x), integer)
    if bias is not None:
        added = ref.wide(bias).reshape(-1, *[1] * _places(site))
        low, high = low + added, high + added
    return low.to(x.dtype), high.to(x.dtype)


@torch.no_grad()
def codes_of(site: Programmed, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a site that multiplies codes does between its converters, in exact arithmetic.

    Args:
        x: its input, (..., G I), or an image (B, C, ...), in host memory.

    Returns:
        Codes behind the DAC, of x's shape, and behind the ADC, (k, *y.shape), before its bound.
    """
    rho, window, spec = site.code_scale, site.call.window, site.spec
    assert rho is not None
    weight, wide = site.weight_codes().cpu().double(), ref.wide(x)
    if window is not None:
        kernel = weight.view(weight.shape[0], -1, *window.kernel_size)
        codes, _, _ = _converted(site, wide, None, 0)
        products = [convolve(codes.double(), kernel, window, spec.groups)]
        shape = (-1, *[1] * _places(site))
    else:
        sizes, shape = list(spec.in_sizes), (-1,)
        rows = wide.unflatten(-1, (spec.groups, sum(sizes))).split(sizes, -1)
        parts = [_converted(site, x_t, None, tile)[0] for tile, x_t in enumerate(rows)]
        codes = torch.cat(parts, -1).flatten(-2)
        tiles = weight.unflatten(0, (spec.groups, -1)).split(sizes, -1)
        pairs = zip(parts, tiles, strict=True)
        products = [torch.einsum("...gi,goi->...go", p.double(), w).flatten(-2) for p, w in pairs]
    scales = [row.cpu().reshape(shape) for row in rho]
    outputs = [
        ref.adc_codes_(y.to(scale.dtype), scale) for y, scale in zip(products, scales, strict=True)
    ]
    return codes, torch.stack(outputs)


def _unrounded(x: Tensor) -> Tensor | None:
    """How far from a float16 x what a runtime converts may be; None in other dtypes.

    ONNX Runtime has no float16 kernels for some activations. It computes them in float32 and leaves
    out the rounding to float16 where a cast back follows, as in front of a DAC.
    """
    if x.dtype != torch.float16:
        return None
    info = torch.finfo(x.dtype)
    return ref.wide(x).abs().clamp_min(info.smallest_normal) * (info.eps / 2)


def _places(site: Programmed) -> int:
    """Axes behind that of the outputs."""
    return 0 if site.call.window is None else len(site.call.window.stride)


def _linear(
    site: Programmed, x: Tensor, off: Tensor | None, integer: bool
) -> tuple[Tensor, Tensor]:
    groups, sizes = site.spec.groups, list(site.spec.in_sizes)

    def by_tile(t: Tensor) -> tuple[Tensor, ...]:
        return t.unflatten(-1, (groups, sum(sizes))).split(sizes, -1)

    xs = by_tile(x)
    offs = [None] * len(sizes) if off is None else by_tile(off)
    exact = site.code_scale is not None
    held = (site.weight_codes() if exact else site.held()).cpu()
    ws = held.unflatten(0, (groups, -1)).split(sizes, -1)
    low = high = x.new_zeros(())
    for tile, (x_t, off_t, w_t) in enumerate(zip(xs, offs, ws, strict=True)):
        converted, spread, r = _converted(site, x_t, off_t, tile)
        if exact:
            converted, w_t = converted.double(), w_t.double()
            spread = None if spread is None else spread.double()
        y = torch.einsum("...gi,goi->...go", converted, w_t)
        size = torch.einsum("...gi,goi->...go", converted.abs(), w_t.abs())
        slack = size * (0 if exact else _units(w_t.shape[-1], w_t.dtype))
        if spread is not None:
            slack = slack + torch.einsum("...gi,goi->...go", spread, w_t.abs())
        ends = _outputs(site, y - slack, y + slack, r, tile, integer)
        low, high = low + ends[0], high + ends[1]
    return low.flatten(-2), high.flatten(-2)


def _convolution(
    site: Programmed, x: Tensor, off: Tensor | None, integer: bool
) -> tuple[Tensor, Tensor]:
    window, groups = site.call.window, site.spec.groups
    assert window is not None
    exact = site.code_scale is not None
    held = (site.weight_codes() if exact else site.held()).cpu()
    kernel = held.view(held.shape[0], -1, *window.kernel_size)
    converted, spread, r = _converted(site, x, off, 0)
    if exact:
        converted, kernel = converted.double(), kernel.double()
        spread = None if spread is None else spread.double()
    y = convolve(converted, kernel, window, groups)
    size = convolve(converted.abs(), kernel.abs(), window, groups)
    slack = size * (0 if exact else _units(held.shape[1], held.dtype))
    if spread is not None:
        slack = slack + convolve(spread, kernel.abs(), window, groups)
    return _outputs(site, y - slack, y + slack, r, 0, integer)


def _units(depth: int, dtype: torch.dtype) -> float:
    """Most that a product may be off by, over the product of magnitudes.

    Two sums of so many products, a runtime's and this module's, are each off by as many roundings.
    """
    return (2 * depth + _OTHER_ROUNDINGS) * torch.finfo(dtype).eps / 2


def _converted(
    site: Programmed, x_t: Tensor, off: Tensor | None, tile: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A tile's input behind the DAC, how far from it another's may be, and its range."""
    mode, ranges = site.spec.range_mode, site.input_range()
    if mode == "none":
        return x_t, off, None
    if mode == "dynamic":
        r = ref.range_dynamic(x_t)
    else:
        assert ranges is not None
        r = ranges[tile].cpu()
    settings, codes = scalars("dac", site.spec), site.code_scale is not None
    if off is None:
        return ref.dac(x_t, r, *settings, codes=codes), None, r
    low, high = (ref.dac(x, r, *settings, codes=codes) for x in (x_t - off, x_t + off))
    return (low + high) / 2, (high - low) / 2, r


def _digitized(
    site: Programmed, y: Tensor, r: Tensor | None, tile: int
) -> tuple[Tensor, Tensor | None]:
    """A tile's product behind the ADC, and the same where the codes end at its last one.

    The second is None without codes. It is a last bit from the first: the bound and the last code's
    step are rounded by themselves.
    """
    spec = site.spec
    if not spec.out_bound:
        return y, None
    assert r is not None and site.maxima is not None
    rho, a = site.code_scale, site.maxima[tile].cpu()
    a = a if spec.bound_per_channel else ref.tile_max(a, spec.out_sizes)
    by_group = () if site.call.window is not None else (spec.groups,)
    shape = (*by_group, -1, *[1] * _places(site))
    a = a.reshape(shape)
    if rho is not None:
        bound = ref.adc_bound(r, a, spec.out_bound)
        scale = rho[tile].cpu().reshape(shape)
        codes, step = ref.adc_codes_(y.to(scale.dtype), scale), ref.adc_step(bound, spec.out_res)
        states = max(spec.out_res, 1 / spec.out_res)
        ended = ref.clamp_to(codes, codes.new_tensor(states / 2)) * step
        return ref.clamp_to(codes * step, bound), ended
    return ref.clamp_to(*ref.adc_(y, a, r, *scalars("adc", spec))), None


def _outputs(
    site: Programmed, low: Tensor, high: Tensor, r: Tensor | None, tile: int, integer: bool
) -> tuple[Tensor, Tensor]:
    """The ends of a tile's product behind its ADC, times what makes up for drift."""
    (low, least), (high, most) = (_digitized(site, y, r, tile) for y in (low, high))
    if integer and least is not None and most is not None:
        low, high = torch.minimum(low, least), torch.maximum(high, most)
    if site.gain is None:
        return low, high
    by_group = () if site.call.window is not None else (site.spec.groups,)
    factor = site.gain[tile].cpu().reshape(*by_group, -1, *[1] * _places(site))
    ends = low * factor, high * factor
    return torch.minimum(*ends), torch.maximum(*ends)
