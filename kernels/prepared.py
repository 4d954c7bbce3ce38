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
from analogfx.kernels import integers
from analogfx.kernels import reference as ref
from analogfx.kernels.linear import product
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.kernels.weights import code_scale, grouped, maxima, modified_weight, scale, tiles

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
        The weights as the tiles hold them (their codes where the site multiplies codes), in
        weight's shape and the precision of the computation; and for every output of k tiles along
        the inputs the scale of its ADC's bound and, for codes, that of its product,
        (1 or 2, k, O), without elements where there is no bound. See :func:`limits`.
    """
    site = decode(MVMSpec, spec)
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        matrix = grouped(weight.flatten(1), site.groups if weight.dim() == 2 else 1, 0)
        rows = site if weight.dim() == 2 else site._replace(groups=1)
        peaks = maxima(matrix, clip, rows)
        codes = integers.depth(site) > 0
        held = modified_weight(matrix, clip, None, peaks, rows, codes).reshape(weight.shape)
        if peaks is None or not site.out_bound:
            return held, held.new_empty(0)
        found = [torch.stack([scale(peak, site.bound_per_channel, rows) for peak in peaks])]
        if codes:
            found.append(torch.stack([code_scale(p, rows).expand_as(p) for p in peaks]))
        return held, torch.stack(found).flatten(2)


def limits(scales: Tensor, input_range: Tensor, spec: str) -> Tensor:
    """What limits the outputs where no range depends on the input.

    Args:
        scales: (1 or 2, k, O), what :func:`prepare` returned.
        input_range: (k,).
        spec: the site's :class:`MVMSpec`, encoded.

    Returns:
        The bound of every output's ADC, where it rounds its step, and where the product is one of
        codes its scale: (1 to 3, k, O).
    """
    site = decode(MVMSpec, spec)
    return torch.stack(_limits(scales.unbind(), input_range.unsqueeze(-1), site))


def _limits(scales: Sequence[Tensor], r: Tensor, spec: MVMSpec) -> tuple[Tensor, ...]:
    bound = ref.adc_bound(r, scales[0], spec.out_bound)
    if not spec.out_res:
        return (bound,)
    return bound, ref.adc_step(bound, spec.out_res), *scales[1:]


def no_bias(weight: Tensor) -> Tensor:
    """Zeros for the outputs of a site without a bias, (O,)."""
    return weight.new_zeros(weight.shape[0])


def convert(x: Tensor, input_range: Tensor | None, spec: str) -> Tensor:
    """The inputs of one product behind the DAC, in the precision of the computation.

    These are codes where the site multiplies codes, else what the codes stand for.

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
        adc: what :func:`limits` returned; where the range is dynamic the scales that
            :func:`prepare` returned; None where there is no bound.
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
            y = _product(tile_x, w[..., s], integers.depth(site))
            if site.out_bound:
                y = _adc(y, [grouped(v, site.groups, 0) for v in _of_tile(adc, t)], r, site)
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
        depth = integers.depth(site)
        y = image.convolve(analog_x, weight, geometry, site.groups, None, depth)
        y = _adc(y, [v.view(axes) for v in _of_tile(adc, 0)], r, site)
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
    if not spec.inp_res:
        return x
    step = ref.step_of(r, spec.inp_res)
    codes = _on_grid(x, step)
    return codes if integers.depth(spec) else codes * step


def _on_grid(x: Tensor, step: Tensor) -> Tensor:
    return torch.round(x / step.clamp_min(torch.finfo(x.dtype).tiny))


def _product(x: Tensor, w: Tensor, depth: int) -> Tensor:
    """x w^T over the last axis: (..., O), or (..., groups, O / groups)."""
    if w.dim() == 2:
        return product(x, w, depth)
    return product(x.reshape(-1, *x.shape[-2:]), w, depth).view(*x.shape[:-1], w.shape[-2])


def _of_tile(adc: Tensor | None, tile: int) -> tuple[Tensor, ...]:
    """The limits of one tile's outputs, each (O,), or their scales where the range is dynamic."""
    assert adc is not None
    return adc[:, tile].unbind()


def _adc(y: Tensor, limits: Sequence[Tensor], r: Tensor | None, spec: MVMSpec) -> Tensor:
    """``reference.adc_`` and the bound, in ops that a compiler can trace."""
    if spec.range_mode == "dynamic":
        assert r is not None
        limits = _limits(limits, r, spec)
    bound, *steps = limits
    if integers.depth(spec):
        step, rho = steps
        y = torch.round(y * rho) * step
    elif steps:
        y = _on_grid(y, *steps) * steps[0]
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
