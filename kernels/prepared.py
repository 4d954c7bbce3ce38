"""One site's product at inference, from weights that were made ready beforehand.

Plain torch throughout, so that a compiler that traces it can fuse the DAC with what produces the
input, and the ADC, bias, activation and residual with one another. The numbers are those of
:mod:`analogfx.kernels.linear` and :mod:`analogfx.kernels.conv` without noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from analogfx.kernels import conv as image
from analogfx.kernels import reference as ref
from analogfx.kernels.linear import product
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.kernels.weights import grouped, maxima, modified_weight, scale, tiles

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(
    torch._C.DispatchKey.AutocastCUDA
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def prepare(weight: Tensor, clip: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """All that inference needs of a weight: what the tiles hold, and what scales their bounds.

    Args:
        weight: (O, I), or (O, C / groups, *kernel) of a convolution.
        clip: (k, O) or None.
        spec: the site's :class:`MVMSpec`, encoded.

    Returns:
        The weights as the tiles hold them, in weight's shape and the precision of the
        computation; and the scale of every output's ADC bound, (k, O) for k tiles along the
        inputs, without elements where there is no bound. See :func:`limits`.
    """
    site = decode(MVMSpec, spec)
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        matrix = grouped(weight.flatten(1), site.groups if weight.dim() == 2 else 1, 0)
        rows = site if weight.dim() == 2 else site._replace(groups=1)
        peaks = maxima(matrix, clip, rows)
        held = modified_weight(matrix, clip, None, peaks, rows).reshape(weight.shape)
        if peaks is None or not site.out_bound:
            return held, held.new_empty(0)
        bounds = [scale(peak, site.bound_per_channel, rows).flatten() for peak in peaks]
        return held, torch.stack(bounds)


def limits(bound_scale: Tensor, input_range: Tensor, spec: str) -> Tensor:
    """What limits the outputs where no range depends on the input.

    Args:
        bound_scale: (k, O), what :func:`prepare` returned.
        input_range: (k,).
        spec: the site's :class:`MVMSpec`, encoded.

    Returns:
        The bound of every output's ADC and, where it rounds, its step: (1 or 2, k, O).
    """
    site = decode(MVMSpec, spec)
    bound = ref.adc_bound(input_range.unsqueeze(-1), bound_scale, site.out_bound)
    return torch.stack(_limits(bound, site))


def _limits(bound: Tensor, spec: MVMSpec) -> tuple[Tensor, ...]:
    if not spec.out_res:
        return (bound,)
    step = ref.step_of(bound, spec.out_res)
    return bound, torch.where(step == 0, 1.0, step)


def no_bias(weight: Tensor) -> Tensor:
    """Zeros for the outputs of a site without a bias, (O,)."""
    return weight.new_zeros(weight.shape[0])


def convert(x: Tensor, input_range: Tensor | None, spec: str) -> Tensor:
    """The inputs of one product behind the DAC, in the precision of the computation.

    Args:
        x: (..., I), or of any shape for a site of one tile.
        input_range: (k,), None where it is dynamic or there is none.
        spec: the site's :class:`MVMSpec`, encoded.
    """
    site = decode(MVMSpec, spec)
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        if len(site.in_sizes) == 1:
            return _converted(x, _range(x, input_range, 0, site), site)
        parts = [
            _converted(x[..., s], _range(x[..., s], input_range, t, site), site)
            for t, s in tiles(site.in_sizes)
        ]
        return torch.cat(parts, dim=-1)


def linear(
    x: Tensor,
    weight: Tensor,
    adc: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_range: Tensor | None,
    analog_x: Tensor | None,
    spec: str,
) -> Tensor:
    """The linear product of one site.

    Args:
        x: (..., groups * I), raw.
        weight: what :func:`prepare` returned.
        adc: what :func:`limits` returned; where the range is dynamic the scale of the bounds;
            None where there is no bound.
        bias: (O,) or None.
        residual: added last, None for nothing.
        input_range: (k,), None where it is dynamic or there is none.
        analog_x: what :func:`convert` made of x, None to do it here.
        spec: the site's :class:`MVMSpec`, encoded.

    Returns:
        (..., O) of x's dtype.
    """
    site = decode(MVMSpec, spec)
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        rows, w = grouped(x, site.groups, -1), grouped(weight, site.groups, 0)
        if site.ends_with_product and site.groups == 1:
            if analog_x is None:
                analog_x = _converted(x, _range(x, input_range, 0, site), site)
            y = F.linear(analog_x, w, None if bias is None else ref.wide(bias))
            return _finish(y, None, residual, x, site)
        total = None
        for t, s in tiles(site.in_sizes):
            r = _range(rows[..., s], input_range, t, site)
            if analog_x is None:
                tile_x = _converted(rows[..., s], r, site)
            else:
                tile_x = grouped(analog_x, site.groups, -1)[..., s]
            y = _product(tile_x, w[..., s])
            if site.out_bound:
                y = _adc(y, [grouped(v, site.groups, 0) for v in _of_tile(adc, t, site)], r, site)
            total = y if total is None else total + y
        assert total is not None
        total = total if site.groups == 1 else total.flatten(-2)
        return _finish(total, bias, residual, x, site)


def conv(
    x: Tensor,
    weight: Tensor,
    adc: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_range: Tensor | None,
    analog_x: Tensor | None,
    window: str,
    spec: str,
) -> Tensor:
    """The convolution of one site with one input tile.

    Args:
        x: (B, C, *image); the rest as for :func:`linear`.
        window: the geometry, encoded.

    Returns:
        (B, O, *out) of x's dtype.
    """
    site, geometry = decode(MVMSpec, spec), decode(Window, window)
    axes = (-1, *[1] * (x.dim() - 2))
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        r = None if input_range is None else input_range[0]
        analog_x = _converted(x, r, site) if analog_x is None else analog_x
        if site.ends_with_product:
            bias = None if bias is None else ref.wide(bias)
            y = image.convolve(analog_x, weight, geometry, site.groups, bias)
            return _finish(y, None, residual, x, site)
        y = image.convolve(analog_x, weight, geometry, site.groups)
        y = _adc(y, [v.view(axes) for v in _of_tile(adc, 0, site)], r, site)
        return _finish(y, None if bias is None else bias.view(axes), residual, x, site)


def _range(x: Tensor, input_range: Tensor | None, tile: int, spec: MVMSpec) -> Tensor | None:
    if spec.range_mode == "dynamic":
        return ref.wide(ref.range_dynamic(x))
    return None if input_range is None else input_range[tile]


def _converted(x: Tensor, r: Tensor | None, spec: MVMSpec) -> Tensor:
    """``reference.dac`` in ops that a compiler can trace: nothing in place, nothing read back."""
    x = ref.wide(x)
    if r is None:
        return x
    if spec.range_mode != "dynamic":
        x = torch.clamp(x, max=r) if spec.nonnegative else torch.clamp(x, -r, r)
    return _round(x, ref.step_of(r, spec.inp_res)) if spec.inp_res else x


def _round(x: Tensor, step: Tensor) -> Tensor:
    return torch.round(x / step.clamp_min(torch.finfo(x.dtype).tiny)) * step


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x w^T over the last axis: (..., O), or (..., groups, O / groups)."""
    if w.dim() == 2:
        return F.linear(x, w)
    return product(x.reshape(-1, *x.shape[-2:]), w).view(*x.shape[:-1], w.shape[-2])


def _of_tile(adc: Tensor | None, tile: int, spec: MVMSpec) -> tuple[Tensor, ...]:
    """The limits of one tile's outputs, each (O,), or their scale where the range is dynamic."""
    assert adc is not None
    return (adc[tile],) if spec.range_mode == "dynamic" else adc[:, tile].unbind()


def _adc(y: Tensor, limits: Sequence[Tensor], r: Tensor | None, spec: MVMSpec) -> Tensor:
    """``reference.adc_`` and the bound, in ops that a compiler can trace."""
    if spec.range_mode == "dynamic":
        assert r is not None
        limits = _limits(ref.adc_bound(r, limits[0], spec.out_bound), spec)
    bound, *steps = limits
    for step in steps:
        y = _round(y, step)
    return torch.clamp(y, -bound, bound)


def _finish(
    y: Tensor, bias: Tensor | None, residual: Tensor | None, x: Tensor, spec: MVMSpec
) -> Tensor:
    """Bias, cast, activation, residual: in the order, and each in the precision, of the graph."""
    if bias is not None:
        y = y + ref.wide(bias)
    y = y.to(x.dtype)
    if spec.activation:
        y = ACTIVATIONS[spec.activation](y)
    return y if residual is None else y + residual
