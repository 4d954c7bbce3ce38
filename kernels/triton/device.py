"""What several kernels share: rounding, the DAC, the generator, the tiles' places, packed bits.

Rounding is half to even and division is the IEEE one, as in the torch implementation: ``/`` on
float32 compiles to an approximation that lands on the other side of a rounding tie now and then;
it serves here only where :func:`quotient` corrects it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from analogfx.kernels import plan

FUSED = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether a fused multiply-add rounds once: the interpreter's rounds twice."""

LEAST = tl.constexpr(1.1754943508222875e-38)
"""float32's least normal number, which no step is below."""

PATCH_ROWS, PATCH_OUTPUTS = tl.constexpr(plan.PATCH[0]), tl.constexpr(plan.PATCH[1])


@triton.jit
def round_even(v):
    """``v`` to the nearest integer, half to even. NaN and |v| >= 2**22 come back as they are.

    Adding 1.5 * 2**23 leaves float32 no bits below the point; the hardware rounds half to even.
    What is beyond 2**22 is beyond any grid's end, too, and about to be clamped.
    """
    return tl.where(tl.abs(v) < 4194304.0, (v + 12582912.0) - 12582912.0, v)


@triton.jit
def rounded_to(v, DTYPE: tl.constexpr):
    """float32 ``v`` in another dtype, to nearest even: the interpreter cuts bits off bfloat16."""
    if not FUSED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        nearest = bits.to(tl.float32, bitcast=True)
        v = tl.where(v == v, nearest, v)
    return v.to(DTYPE)


@triton.jit
def clamp(v, bound):
    """``v`` within +-bound; NaN passes, as in ``torch.clamp``."""
    v = tl.where(v < -bound, -bound, v)
    return tl.where(v > bound, bound, v)


@triton.jit
def quotient(v, divisor, inverse):
    """v / divisor as IEEE division rounds it, given nearly 1 / divisor. All of one shape.

    The remainder of a first quotient is exact by the fused multiply-add, and corrects it (Markstein
    1990). The hardware's own division is a subroutine, around which the compiler keeps so much
    at hand that it spills next to an accumulator.
    """
    if FUSED:
        first = v * inverse
        second = tl.fma(tl.fma(-first, divisor, v), inverse, first)
        second = tl.where(tl.abs(first) < float("inf"), second, first)
    else:
        second = tl.math.div_rn(v, divisor)
    return second


@triton.jit
def step_of(bound, RES: tl.constexpr):
    """Width of a step over +-bound for a resolution in states or as a fraction."""
    if RES > 1.0:
        like = tl.zeros_like(bound)
        step = quotient(2.0 * bound, like + RES, like + 1.0 / RES)
    else:
        step = 2.0 * bound * RES
    return step


@triton.jit
def on_grid(v, step):
    """The number of steps that ``v`` is rounded to. A step of 0 counts as float32's least."""
    least = tl.maximum(step, LEAST)
    inverse = 1.0 / least + tl.zeros_like(v)  # approximate, but made once where a step serves many
    return round_even(quotient(v, least + tl.zeros_like(v), inverse))


@triton.jit
def dac(x, input_range, RANGE: tl.constexpr, INP_RES: tl.constexpr, VALUES: tl.constexpr):
    """One tile's input behind the DAC, float32: integers, or with VALUES what they stand for.

    Without a resolution: the clamped input.
    """
    if RANGE != "dynamic":
        x = clamp(x, input_range)
    if INP_RES > 0:
        step = step_of(input_range, INP_RES)
        x = on_grid(x, step)
        if VALUES:
            x = x * step
    return x


@triton.jit
def tile_span(tile, size, larger, EVEN: tl.constexpr):
    """First input of a tile and how many it has: ``larger`` tiles have one more than ``size``."""
    start = tile * size
    length = size
    if not EVEN:
        start += tl.minimum(tile, larger)
        length += (tile < larger).to(tl.int32)
    return start, length


@triton.jit
def tile_range(p_range, tile, o_row, n_rows, RANGE: tl.constexpr, TILES: tl.constexpr):
    """The range of one tile: a scalar, (ROWS, 1) where it is dynamic, 1 where there is none."""
    r = 1.0
    if RANGE == "fixed":
        r = tl.load(p_range + tile)
    elif RANGE == "dynamic":
        r = tl.load(p_range + o_row * TILES + tile, mask=o_row < n_rows, other=0.0)[:, None]
    return r


@triton.jit
def merge(count, mean, m2, more, more_mean, more_m2):
    """Moments of two samples taken together."""
    both = count + more
    share = tl.where(both > 0, more / tl.maximum(both, 1.0), 0.0)
    delta = more_mean - mean
    return both, mean + delta * share, m2 + more_m2 + delta * delta * count * share


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. "interpreted": in float32, for an interpreter that multiplies bfloat16's bits."""
    if PRECISION == "interpreted":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "int8":
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def words(seed, counter, stream):
    """Four random words for every 64-bit counter."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero)


@triton.jit
def sine_and_cosine(angle):
    """sin and cos of an angle in [0, 2 pi], to 1e-7.

    The library's functions reduce arguments of any size, for which they keep an array in local
    memory. Polynomials: Cephes, sinf.c.
    """
    quarter = round_even(angle * 0.6366197723675814)
    rest = angle - quarter * 1.5703125  # exact, like the next two products: few bits each
    rest = (rest - quarter * 4.837512969970703125e-4) - quarter * 7.54978995489188216e-8
    z = rest * rest
    s = rest + rest * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    c = 4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)
    c = 1.0 - 0.5 * z + z * z * c
    turn = quarter.to(tl.int32)
    odd = (turn & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((turn & 2) != 0, -sine, sine)
    return sine, tl.where(((turn + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def normal_pair(first, second):
    """Two standard normal values from two words, as ``tl.randn`` makes them."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(1.0e-7, tl.uint_to_uniform_float(first))))
    sine, cosine = sine_and_cosine(6.283185307179586 * tl.uint_to_uniform_float(second))
    return radius * cosine, radius * sine


@triton.jit
def normal_quads(seed, counter, stream):
    """The four values of every counter, in two new last axes of 2."""
    a, b, c, d = words(seed, counter, stream)
    n0, n1 = normal_pair(a, b)
    n2, n3 = normal_pair(c, d)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def normal_at(seed, index, stream):
    """The value of every element index: four times the work of whole quads, at any alignment."""
    a, b, c, d = words(seed, index >> 2, stream)
    later = (index & 2) != 0
    even, odd = normal_pair(tl.where(later, c, a), tl.where(later, d, b))
    return tl.where((index & 1) != 0, odd, even)


@triton.jit
def halves(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right columns."""
    return tl.split(tl.permute(tl.reshape(y, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def pack(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bools (ROWS, COLUMNS) as bytes (ROWS, COLUMNS / 8); column 8 j + b is bit b of byte j."""
    split = tl.reshape(bits.to(tl.int32), (ROWS, COLUMNS // 8, 8))
    return tl.sum(split << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def masked(g, p_bits, tile, o_row, o_out, m, n_rows, n_outputs):
    """``g`` with 0 where the tile's ADC clipped; all (ROWS, COLUMNS)."""
    row = (tile.to(tl.int64) * n_rows + o_row) * ((n_outputs + 7) // 8)
    byte = tl.load(p_bits + row + (o_out >> 3), mask=m, other=0)
    clipped = (byte.to(tl.int32) >> (o_out & 7)) & 1
    return tl.where(clipped != 0, 0.0, g).to(g.dtype)


@triton.jit
def any_marked(p_marks, first, end, COUNT: tl.constexpr):
    """Whether one of COUNT marks from ``first`` on, those before ``end``, is set."""
    o = first + tl.arange(0, COUNT)
    return tl.max(tl.load(p_marks + o, mask=o < end, other=0).to(tl.int32), axis=0) != 0


@triton.jit
def swizzled(pid, n_down, n_across, GROUP: tl.constexpr):
    """Block row and column of a program: columns of GROUP blocks, whose operands stay in L2."""
    per_group = GROUP * n_across
    first = (pid // per_group) * GROUP
    height = tl.minimum(n_down - first, GROUP)
    return first + (pid % per_group) % height, (pid % per_group) // height
