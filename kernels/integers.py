"""Sites whose ADC codes are a function of integers, and nothing else.

Where inputs pass a DAC and weights are quantised, without noise, a tile multiplies codes by codes:

    acc  = sum_i q_x[i] q_w[i]                       an integer
    code = round(acc rho),  rho = s_x s_w / d        s_x, s_w, d: steps of DAC, weights, ADC

A small multiple of the product's step is often the ADC's (84 with 14 states of the weight and a
bound of 12), so that one output in so many lies exactly between two codes. Summed as floats, the
order of the sum decides where it goes, which differs from one program, and one CPU, to another.
Here the sum is exact in any order, and ``rho`` is made once, so that every program finds the same
code. The input range cancels in ``rho``, and so do the maxima where weight and bound have the same.

float32 holds every integer up to 2**24; a tile whose sum may be larger is summed in parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from analogfx.kernels.spec import MVMSpec, reference_only

_EXACT = (1 << 24) - 1
"""Integers up to which float32 holds all of them, and so all partial sums."""

_SHORTEST = 64
"""Products that a part is to sum at least: shorter ones cost more than the product itself.

Converters so fine (19 bits of input and weight together) have no systematic ties.
"""


def states(res: float) -> float:
    """Number of steps of a resolution over its full range."""
    return res if res > 1 else 1 / res


def largest(count: float) -> int:
    """Magnitude of the largest code of a quantiser of so many steps."""
    return math.floor(count / 2 + 0.5)


def depth(spec: MVMSpec) -> int:
    """How many products of codes float32 sums exactly; 0 for a site that multiplies no codes."""
    noisy = spec.noise_std or spec.out_noise
    codes = spec.inp_res and spec.weight_states and spec.range_mode != "none"
    if noisy or not codes or not (spec.out_bound and spec.out_res) or reference_only(spec):
        return 0
    product = largest(states(spec.inp_res)) * largest(spec.weight_states)
    found = _EXACT // max(product, 1)
    return found if found >= min(_SHORTEST, *spec.in_sizes) else 0


def largest_of(spec: MVMSpec) -> int:
    """The largest code that a site multiplies, of its inputs or weights; 0 if it does not."""
    if not depth(spec):
        return 0
    return max(largest(states(spec.inp_res)), largest(spec.weight_states))


def widest_row(spec: MVMSpec) -> int:
    """Sum of a row's magnitudes, in codes of its weights, up to which no sum passes 2**24."""
    return _EXACT // largest(states(spec.inp_res))


def ratio(spec: MVMSpec) -> float:
    """``rho`` of a tile whose weights and bound are scaled by the same maximum."""
    product = states(spec.inp_res) * spec.weight_states * spec.out_bound
    return 2 * states(spec.out_res) / product


def same_maxima(spec: MVMSpec) -> bool:
    """Whether what scales the weights' steps scales the bound."""
    return spec.weight_per_channel == spec.bound_per_channel


def parts(size: int, depth: int) -> Iterator[slice]:
    """Slices of so many inputs that are short enough, as even as they can be."""
    count = -(-size // depth)
    ends = [size * number // count for number in range(count + 1)]
    return map(slice, ends, ends[1:])
