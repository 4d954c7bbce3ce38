"""The ops of domain ``ai.analogfx``, version 2, and what they mean in standard ONNX.

Every body does the arithmetic of :mod:`analogfx.kernels` in the same order (true divisions,
rounding half to even), so that a runtime gives what PyTorch gives, but for the order in which a
product is summed. Data is of type T (float, float16, bfloat16, double); everything inside is
computed in float (double for double) and rounded to T once, at the end. docs/onnx/ has a page for
each op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from analogfx.kernels import integers
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.onnx.writer import Writer

_CODES = 127
"""Largest code of an 8-bit converter."""

_PAIRED = 64
"""Largest weight code of which a kernel may add two products with bytes in 16 bits.

The instruction of x86 that multiplies unsigned by signed bytes (pmaddubsw) adds products in pairs
and saturates: 2 * 255 * 64 = 32640 fits in a signed 16-bit number, with 65 it does not.
"""


def _tiny(dtype: ir.DataType) -> float:
    return float(np.finfo(dtype.numpy()).tiny)


def _step(w: Writer, bound: ir.Value, res: float, dtype: ir.DataType) -> ir.Value:
    """Width of a step over +-bound, for a resolution in states or as a fraction."""
    full = w.op("Mul", bound, w.scalar(2.0, dtype))
    return w.op("Div" if res > 1 else "Mul", full, w.scalar(res, dtype))


def _on_grid(w: Writer, x: ir.Value, step: ir.Value, dtype: ir.DataType) -> ir.Value:
    divisor = w.op("Max", step, w.scalar(_tiny(dtype), dtype))
    return w.op("Round", w.op("Div", x, divisor))


def _quantize(w: Writer, x: ir.Value, step: ir.Value, dtype: ir.DataType) -> ir.Value:
    return w.op("Mul", _on_grid(w, x, step, dtype), step)


def _clamp(
    w: Writer, x: ir.Value, bound: ir.Value, dtype: ir.DataType, scalar: bool = True
) -> ir.Value:
    """``x`` within +-bound. Clip is one pass where Max and Min are two, but takes scalars only."""
    low = w.op("Neg", bound)
    if scalar and dtype == ir.DataType.FLOAT:  # ONNX Runtime fails on Relu, Clip of doubles
        return w.op("Clip", x, low, bound)
    return w.op("Min", w.op("Max", x, low), bound)


@dataclass(frozen=True)
class DynamicRange:
    """Largest magnitude of every input vector: ``max_i |x_i|`` over the last axis, kept."""

    inputs = ("x",)

    def attributes(self) -> dict[str, Any]:
        """None."""
        return {}

    def body(self, w: Writer, *inputs: ir.Value | None) -> ir.Value:
        """ReduceMax of Abs."""
        (x,) = inputs
        return w.op("ReduceMax", w.op("Abs", x), w.ints(-1), keepdims=1)


@dataclass(frozen=True)
class DAC:
    """Clamp to the input range and round to the converter's grid."""

    inp_res: float
    clamp: bool
    dtype: ir.DataType
    codes: bool = False
    """Whether to give codes, not what they stand for."""

    inputs = ("x", "input_range")

    def attributes(self) -> dict[str, Any]:
        """Resolution (0: no rounding), whether the range clamps, and whether to give codes."""
        return {
            "inp_res": self.inp_res,
            "clamp": int(self.clamp),
            **({"codes": 1} if self.codes else {}),
        }

    def body(self, w: Writer, *inputs: ir.Value | None) -> ir.Value:
        """``round(clamp(x, +-r) / step) * step`` with ``step = 2 r / inp_res``."""
        x, r = inputs
        assert x is not None and r is not None
        if self.clamp:
            x = _clamp(w, x, r, self.dtype)
        if not self.inp_res:
            return x
        step = _step(w, r, self.inp_res, self.dtype)
        if self.codes:
            return _on_grid(w, x, step, self.dtype)
        return _quantize(w, x, step, self.dtype)


@dataclass(frozen=True)
class ADC:
    """Round a tile's product to the converter's grid, then clamp it to the bound."""

    out_bound: float
    out_res: float
    scalar: bool
    """Whether the bound is one number for the whole tensor."""
    dtype: ir.DataType

    inputs = ("y", "input_range", "weight_max", "code_scale")

    def attributes(self) -> dict[str, Any]:
        """Bound in units of input range x largest weight, and resolution (0: no rounding)."""
        return {"out_bound": self.out_bound, "out_res": self.out_res}

    def body(self, w: Writer, *inputs: ir.Value | None) -> ir.Value:
        """``clamp(round(y / step) * step, +-B)``, ``B = r out_bound a``, ``step = 2 B / res``.

        With a code_scale y is a sum of products of codes, and ``y code_scale`` is rounded.
        """
        y, r, a, rho = (*inputs, None)[:4]
        assert y is not None and r is not None and a is not None
        bound = self.bound(w, r, a)
        if rho is not None:
            # The scale comes first: ONNX Runtime folds a constant that comes second into the
            # kernel of a convolution, whose weights were integers.
            y = w.op("Mul", w.op("Round", w.op("Mul", rho, y)), self.step(w, bound))
        elif self.out_res:
            y = _quantize(w, y, self.step(w, bound), self.dtype)
        return _clamp(w, y, bound, self.dtype, self.scalar)

    def bound(self, w: Writer, r: ir.Value, a: ir.Value) -> ir.Value:
        """Largest output that the converter can show."""
        return w.op("Mul", w.op("Mul", r, w.scalar(self.out_bound, self.dtype)), a)

    def step(self, w: Writer, bound: ir.Value) -> ir.Value:
        """Width of the grid. A row of zero weights has bound 0: 1 lets the clamp make it 0."""
        step = _step(w, bound, self.out_res, self.dtype)
        one, zero = w.scalar(1.0, self.dtype), w.scalar(0.0, self.dtype)
        return w.op("Where", w.op("Equal", step, zero), one, step)


@dataclass(frozen=True)
class Seeds:
    """Seeds of one site's noise, for Monte-Carlo in a runtime."""

    weight: float
    output: float


_INPUTS = ("x", "weight", "weight_scale", "bias", "input_range", "weight_max", "code_scale")


@dataclass(frozen=True)
class _Site:
    """What AnalogLinear and AnalogConv share."""

    spec: MVMSpec
    """The site's scalars; noise strengths are 0 unless ``seeds`` are given."""
    data: ir.DataType
    """T: type of input, bias and output."""
    codes: bool
    """Whether the weight comes as integer codes."""
    integer: bool = False
    """Whether to multiply codes by codes (level "qdq")."""
    seeds: Seeds | None = None
    compensated: bool = False
    """Whether factors behind the ADC come along."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return _INPUTS + ("gain",) * self.compensated

    @property
    def depth(self) -> int:
        """Products of codes that floats sum exactly; 0 for a site that multiplies values."""
        return integers.depth(self.spec) if self.codes else 0

    @property
    def dtype(self) -> ir.DataType:
        """The type that the site computes in."""
        return ir.DataType.DOUBLE if self.data == ir.DataType.DOUBLE else ir.DataType.FLOAT

    def attributes(self) -> dict[str, Any]:
        """The scalars of the site."""
        s = self.spec
        named: dict[str, Any] = {
            "group": s.groups,
            "in_sizes": list(s.in_sizes),
            "out_sizes": list(s.out_sizes),
            "range_mode": s.range_mode,
            "inp_res": s.inp_res,
            "weight_states": s.weight_states,
            "weight_per_channel": int(s.weight_per_channel),
            "out_bound": s.out_bound,
            "out_res": s.out_res,
            "bound_per_channel": int(s.bound_per_channel),
        }
        if self.seeds is not None:
            named |= {
                "noise_std": s.noise_std,
                "noise_per_channel": int(s.noise_per_channel),
                "out_noise": s.out_noise,
                "out_noise_per_channel": int(s.out_noise_per_channel),
                "weight_seed": self.seeds.weight,
                "output_seed": self.seeds.output,
            }
        return named

    def wide(self, w: Writer, x: ir.Value) -> ir.Value:
        """Data in the type that the site computes in."""
        return x if self.data == self.dtype else w.op("Cast", x, to=self.dtype)

    def narrow(self, w: Writer, y: ir.Value) -> ir.Value:
        """The result, rounded once to the type of the data."""
        return y if self.data == self.dtype else w.op("Cast", y, to=self.data)

    def row(self, w: Writer, table: ir.Value, tile: int) -> ir.Value:
        """One tile's entry of a tensor whose first axis is tiles."""
        return w.op("Gather", table, w.op("Constant", value=ir.tensor(np.array(tile))), axis=0)

    def scale(self, w: Writer, peak: ir.Value, per_channel: bool) -> tuple[ir.Value, bool]:
        """A row's own maximum (O,), or that of its tile; and whether it is one number."""
        if per_channel:
            return peak, False
        sizes = self.spec.out_sizes
        if len(sizes) == 1:
            return w.op("ReduceMax", peak, keepdims=0), True
        parts = [
            w.op("Expand", w.op("ReduceMax", part, keepdims=1), w.ints(size))
            for part, size in zip(w.split(peak, sizes, 0), sizes, strict=True)
        ]
        return w.op("Concat", *parts, axis=0), False

    def noisy_weight(
        self, w: Writer, tile: ir.Value, draw: ir.Value | None, peak: ir.Value | None
    ) -> ir.Value:
        """A tile's weights (O, I) with programming noise."""
        if draw is None:
            return tile
        assert peak is not None
        a, scalar = self.scale(w, peak, self.spec.noise_per_channel)
        sigma = w.op("Mul", a, w.scalar(self.spec.noise_std, self.dtype))
        sigma = sigma if scalar else w.op("Unsqueeze", sigma, w.ints(-1))
        return w.op("Add", w.op("Mul", draw, sigma), tile)

    def draw(self, w: Writer, like: ir.Value, seed: float, strength: float) -> ir.Value | None:
        """Standard normal values of a tensor's shape, None where the strength is 0."""
        if self.seeds is None or not strength:
            return None
        return w.op("RandomNormalLike", like, dtype=self.dtype, seed=seed)

    def output(
        self,
        w: Writer,
        y: ir.Value,
        draw: ir.Value | None,
        r: ir.Value | None,
        peak: ir.Value | None,
        rho: ir.Value | None,
        trailing: Sequence[int] = (),
    ) -> ir.Value:
        """A tile's product behind output noise and ADC.

        Args:
            trailing: shape that a vector over outputs takes to broadcast against ``y``.
        """
        s = self.spec

        def scaled(per_channel: bool) -> tuple[ir.Value, bool]:
            assert peak is not None
            a, scalar = self.scale(w, peak, per_channel)
            return (w.op("Reshape", a, w.ints(*trailing)) if trailing and not scalar else a), scalar

        if draw is not None:
            a, _ = scaled(s.out_noise_per_channel)
            strength = w.op("Mul", r, w.scalar(s.out_noise, self.dtype))
            y = w.op("Add", y, w.op("Mul", draw, w.op("Mul", a, strength)))
        if not s.out_bound:
            return y
        a, scalar = scaled(s.bound_per_channel)
        scalar = scalar and s.range_mode != "dynamic"
        adc = ADC(s.out_bound, s.out_res, scalar, self.dtype)
        if rho is None:
            return w.call(adc, y, r, a)
        return w.call(adc, y, r, a, w.op("Reshape", rho, w.ints(*trailing)) if trailing else rho)

    def compensate(
        self,
        w: Writer,
        y: ir.Value,
        gains: Sequence[ir.Value | None],
        tile: int,
        trailing: Sequence[int],
    ) -> ir.Value:
        """A tile's outputs times its factors, where there are any."""
        for gain in gains:
            assert gain is not None
            factor = self.row(w, gain, tile)
            factor = w.op("Reshape", factor, w.ints(*trailing)) if trailing else factor
            y = w.op("Mul", y, factor)
        return y

    def converted(self, w: Writer, x: ir.Value, r: ir.Value | None) -> ir.Value:
        """One tile's input behind the DAC."""
        s = self.spec
        clamp = s.range_mode != "dynamic"
        if r is None or not (clamp or s.inp_res):
            return x
        return w.call(DAC(s.inp_res, clamp, self.dtype, self.depth > 0), x, r)

    def exact_sum(self, w: Writer, parts: Sequence[ir.Value]) -> ir.Value:
        """The sum of integers that floats hold one by one, but not together; rounded once."""
        if len(parts) == 1:
            return parts[0]
        wide = [w.op("Cast", part, to=ir.DataType.DOUBLE) for part in parts]
        total = wide[0]
        for part in wide[1:]:
            total = w.op("Add", total, part)
        return w.op("Cast", total, to=self.dtype)

    def lengths(self, size: int, unit: int = 1) -> list[int]:
        """Sizes of the parts that a sum of ``size`` times ``unit`` products is taken in."""
        depth = self.depth
        if not depth or self.dtype == ir.DataType.DOUBLE or size * unit <= depth:
            return [size]
        return [s.stop - s.start for s in integers.parts(size, max(depth // unit, 1))]

    def input_codes(self, w: Writer, x: ir.Value, r: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The DAC's codes as uint8 around 128, and its step."""
        step = _step(w, r, self.spec.inp_res, self.dtype)
        divisor = w.op("Max", step, w.scalar(_tiny(self.dtype), self.dtype))
        clamped = _clamp(w, x, r, self.dtype)
        return w.op("QuantizeLinear", clamped, divisor, self.zero_point(w)), step

    def zero_point(self, w: Writer) -> ir.Value:
        """The code of 0. Unsigned, because runtimes on x86 are fast for that alone."""
        return w.op("Constant", value=ir.tensor(np.array(_CODES + 1, np.uint8)))

    def in_pairs(
        self, w: Writer, x: ir.Value, codes: ir.Value, axis: int
    ) -> tuple[ir.Value, ir.Value]:
        """Codes whose products no kernel saturates: large weights as two halves, inputs twice.

        Args:
            x: codes of the input, uint8.
            codes: of the weight, int8; its inputs are axis 1.
            axis: of the inputs in ``x``.
        """
        if round(self.spec.weight_states / 2) <= _PAIRED:
            return x, codes
        whole = w.op("Cast", codes, to=ir.DataType.INT32)
        half = w.op("Div", whole, w.op("Constant", value=ir.tensor(np.array(2, np.int32))))
        halves = (half, w.op("Sub", whole, half))
        signed = [w.op("Cast", part, to=ir.DataType.INT8) for part in halves]
        return w.op("Concat", x, x, axis=axis), w.op("Concat", *signed, axis=1)

    def why_floats(self) -> str | None:
        """Why the product of the DAC's codes with the weight's needs floats; None for integers."""
        s = self.spec
        reasons = {
            "its weights are floats: set modifier.quantization_type and a modifier.res of at most "
            "254": self.codes,
            f"its range is {s.range_mode}, not static": s.range_mode in ("static", "fast"),
            "its DAC has no 8 bits: set forward.inp_res to at most 254": _is_8_bit(s.inp_res),
            "it computes in double": self.dtype == ir.DataType.FLOAT,
            "it has noise": self.seeds is None,
        }
        return next((reason for reason, fits in reasons.items() if not fits), None)


def _is_8_bit(res: float) -> bool:
    """Whether a converter's codes stay within +-127."""
    return bool(res) and max(res, 1 / res) <= 2 * _CODES


@dataclass(frozen=True)
class AnalogLinear(_Site):
    """A matrix-vector product on tiles: ``sum_t ADC(DAC(x_t) w_t^T) + bias``."""

    def why_floats(self) -> str | None:
        """As for every site; the integer product has no groups."""
        return super().why_floats() or ("it has groups" if self.spec.groups > 1 else None)

    def body(self, w: Writer, *inputs: ir.Value | None) -> ir.Value:
        """Tile by tile, then the digital sum and the bias."""
        x, weight, weight_scale, bias, input_range, weight_max, code_scale, *gains = inputs
        assert x is not None and weight is not None
        rows = self._grouped(w, self.wide(w, x))
        sizes = self.spec.in_sizes
        matrix = self._codes(w, weight)
        xs, ws = w.split(rows, sizes, -1), w.split(matrix, sizes, 1)
        # Like the matrix, not the weight: runtimes draw like floats alone.
        noise = self.draw(w, matrix, self._seed("weight"), self.spec.noise_std)
        noises = [None] * len(sizes) if noise is None else w.split(noise, sizes, 1)
        ranges, peaks, rhos, products = [], [], [], []
        for tile in range(len(sizes)):
            r = self._range(w, xs[tile], input_range, tile)
            peak = None if weight_max is None else self.row(w, weight_max, tile)
            scale = None if weight_scale is None else self.row(w, weight_scale, tile)
            ranges.append(r)
            peaks.append(peak)
            rhos.append(None if code_scale is None else self.row(w, code_scale, tile))
            if self.integer:
                products.append(self._integer_product(w, xs[tile], r, ws[tile], scale))
                continue
            held = ws[tile] if self.depth else self._dequantized(w, ws[tile], scale)
            held = self.noisy_weight(w, held, noises[tile], peak)
            parts = self.lengths(sizes[tile])
            pairs = zip(
                w.split(self.converted(w, xs[tile], r), parts, -1),
                w.split(held, parts, 1),
                strict=True,
            )
            products.append(self.exact_sum(w, [self._product(w, *pair) for pair in pairs]))
        draws = self._output_draws(w, products)
        total = None
        rows_of_tiles = zip(products, draws, ranges, peaks, rhos, strict=True)
        for tile, (y, draw, r, peak, rho) in enumerate(rows_of_tiles):
            y = self.output(w, y, draw, r, peak, rho, self._by_group())
            y = self.compensate(w, y, gains, tile, self._by_group())
            total = y if total is None else w.op("Add", total, y)
        assert total is not None
        y = self._flat(w, total, x)
        if bias is not None:
            y = w.op("Add", y, self.wide(w, bias))
        return self.narrow(w, y)

    def _seed(self, name: str) -> float:
        return 0.0 if self.seeds is None else getattr(self.seeds, name)

    def _range(
        self, w: Writer, x: ir.Value, input_range: ir.Value | None, tile: int
    ) -> ir.Value | None:
        if self.spec.range_mode == "dynamic":
            return w.call(DynamicRange(), x)
        return None if input_range is None else self.row(w, input_range, tile)

    def _codes(self, w: Writer, weight: ir.Value) -> ir.Value:
        """The weight as the product takes it: codes as int8, else in the site's precision."""
        if self.integer:
            return w.op("Cast", weight, to=ir.DataType.INT8)
        if self.codes or self.data != self.dtype:
            return w.op("Cast", weight, to=self.dtype)
        return weight

    def _dequantized(self, w: Writer, tile: ir.Value, scale: ir.Value | None) -> ir.Value:
        if scale is None:
            return tile
        return w.op("Mul", tile, w.op("Unsqueeze", scale, w.ints(-1)))

    def _product(self, w: Writer, x: ir.Value, matrix: ir.Value) -> ir.Value:
        groups = self.spec.groups
        if groups == 1:
            return w.op("MatMul", x, w.op("Transpose", matrix, perm=[1, 0]))
        out = sum(self.spec.out_sizes) // groups
        matrix = w.op("Reshape", matrix, w.ints(groups, out, -1))
        rows = w.op("Unsqueeze", x, w.ints(-2))
        y = w.op("MatMul", rows, w.op("Transpose", matrix, perm=[0, 2, 1]))
        return w.op("Squeeze", y, w.ints(-2))

    def _integer_product(
        self,
        w: Writer,
        x: ir.Value,
        r: ir.Value | None,
        codes: ir.Value,
        scale: ir.Value | None,
    ) -> ir.Value:
        assert r is not None and scale is not None
        x, step = self.input_codes(w, x, r)
        x, codes = self.in_pairs(w, x, codes, -1)
        matrix = w.op("Transpose", codes, perm=[1, 0])
        count = w.op("MatMulInteger", x, matrix, self.zero_point(w))
        count = w.op("Cast", count, to=self.dtype)
        return count if self.depth else w.op("Mul", count, w.op("Mul", step, scale))

    def _output_draws(self, w: Writer, products: list[ir.Value]) -> Sequence[ir.Value | None]:
        """Independent noise for every tile's product, from one generator."""
        if self.seeds is None or not self.spec.out_noise:
            return [None] * len(products)
        new = w.ints(0)
        stacked = w.op("Concat", *(w.op("Unsqueeze", y, new) for y in products), axis=0)
        draw = self.draw(w, stacked, self.seeds.output, self.spec.out_noise)
        assert draw is not None
        return [self.row(w, draw, tile) for tile in range(len(products))]

    def _by_group(self) -> tuple[int, ...]:
        return () if self.spec.groups == 1 else (self.spec.groups, -1)

    def _grouped(self, w: Writer, x: ir.Value) -> ir.Value:
        """(..., groups * I) as (..., groups, I)."""
        if self.spec.groups == 1:
            return x
        inner = w.ints(self.spec.groups, sum(self.spec.in_sizes))
        leading = w.op("Shape", x, start=0, end=-1)
        return w.op("Reshape", x, w.op("Concat", leading, inner, axis=0))

    def _flat(self, w: Writer, y: ir.Value, x: ir.Value) -> ir.Value:
        """(..., groups, O / groups) as (..., O)."""
        if self.spec.groups == 1:
            return y
        shape = w.op("Concat", w.op("Shape", x, start=0, end=-1), w.ints(-1), axis=0)
        return w.op("Reshape", y, shape)


@dataclass(frozen=True)
class AnalogConv(_Site):
    """A convolution on one row of tiles: ``ADC(conv(DAC(x), w)) + bias``, no patches made."""

    window: Window = Window([], [], [], [])  # noqa: RUF009 (an immutable default)

    def attributes(self) -> dict[str, Any]:
        """The scalars of the site and the geometry, under ONNX Conv's names."""
        return {**super().attributes(), "kernel_shape": list(self.window.kernel_size)} | (
            self._geometry()
        )

    def _geometry(self) -> dict[str, Any]:
        return {
            "strides": list(self.window.stride),
            "pads": list(self.window.padding) * 2,
            "dilations": list(self.window.dilation),
            "group": self.spec.groups,
        }

    def body(self, w: Writer, *inputs: ir.Value | None) -> ir.Value:
        """Element by element around one convolution."""
        x, weight, weight_scale, bias, input_range, weight_max, code_scale, *gains = inputs
        assert x is not None and weight is not None
        rho = None if code_scale is None else self.row(w, code_scale, 0)
        r = None if input_range is None else self.row(w, input_range, 0)
        peak = None if weight_max is None else self.row(w, weight_max, 0)
        scale = None if weight_scale is None else self.row(w, weight_scale, 0)
        image = (-1, *[1] * len(self.window.stride))
        x = self.wide(w, x)
        if self.integer:
            y = self._integer_output(w, x, r, weight, rho, peak)
        else:
            kernel = self._kernel(w, weight, None if self.depth else scale, peak)
            y = self._convolved(w, self.converted(w, x, r), kernel)
            draw = self.draw(w, y, self.seeds.output if self.seeds else 0.0, self.spec.out_noise)
            y = self.output(w, y, draw, r, peak, rho, image)
        y = self.compensate(w, y, gains, 0, image)
        if bias is not None:
            y = w.op("Add", y, w.op("Reshape", self.wide(w, bias), w.ints(*image)))
        return self.narrow(w, y)

    def _convolved(self, w: Writer, x: ir.Value, kernel: ir.Value) -> ir.Value:
        """One convolution, or several over parts of the channels whose sums are exact."""
        taps, groups = math.prod(self.window.kernel_size), self.spec.groups
        parts = self.lengths(sum(self.spec.in_sizes) // taps, taps)
        if len(parts) == 1:
            return w.op("Conv", x, kernel, **self._geometry())
        if groups > 1 or taps > self.depth:
            wide = [w.op("Cast", t, to=ir.DataType.DOUBLE) for t in (x, kernel)]
            return w.op("Cast", w.op("Conv", *wide, **self._geometry()), to=self.dtype)
        pairs = zip(w.split(x, parts, 1), w.split(kernel, parts, 1), strict=True)
        return self.exact_sum(w, [w.op("Conv", *pair, **self._geometry()) for pair in pairs])

    def _kernel(
        self, w: Writer, weight: ir.Value, scale: ir.Value | None, peak: ir.Value | None
    ) -> ir.Value:
        kernel = weight
        if self.codes or self.data != self.dtype:
            kernel = w.op("Cast", weight, to=self.dtype)
        one = (-1, *[1] * (1 + len(self.window.stride)))
        if scale is not None:
            kernel = w.op("Mul", kernel, w.op("Reshape", scale, w.ints(*one)))
        if self.seeds is None or not self.spec.noise_std:
            return kernel
        matrix = w.op("Flatten", kernel, axis=1)
        draw = self.draw(w, matrix, self.seeds.weight, self.spec.noise_std)
        noisy = self.noisy_weight(w, matrix, draw, peak)
        return w.op("Reshape", noisy, w.op("Shape", weight))

    def why_floats(self) -> str | None:
        """As for every site, and the ADC's codes must fit: they are what the kernel returns."""
        s = self.spec
        fits = bool(s.out_bound) and _is_8_bit(s.out_res)
        no_adc = "its ADC has no 8 bits: set forward.out_bound, and forward.out_res to at most 254"
        return super().why_floats() or (None if fits else no_adc)

    def _integer_output(
        self,
        w: Writer,
        x: ir.Value,
        r: ir.Value | None,
        codes: ir.Value,
        rho: ir.Value | None,
        peak: ir.Value | None,
    ) -> ir.Value:
        """One integer kernel from the DAC's codes to the ADC's.

        The kernel multiplies its sums by the scales of inputs and weights over that of outputs, in
        float: by rho over 1, so that the codes are those of every other level.
        """
        s = self.spec
        assert r is not None and rho is not None and peak is not None
        a, scalar = self.scale(w, peak, s.bound_per_channel)
        adc = ADC(s.out_bound, s.out_res, scalar, self.dtype)
        bound = adc.bound(w, r, a)
        step = w.op("Expand", adc.step(w, bound), w.op("Shape", rho))
        x, _ = self.input_codes(w, x, r)
        zero, one = self.zero_point(w), w.scalar(1.0, self.dtype)
        x, codes, weight_zero = self._convolved_codes(w, x, codes)
        y = w.op(
            "QLinearConv",
            *(x, one, zero),
            *(codes, rho, weight_zero),
            *(one, zero),
            **self._geometry(),
        )
        y = w.op("DequantizeLinear", y, step, w.op("Expand", zero, w.op("Shape", rho)), axis=1)
        if not scalar:
            bound = w.op("Reshape", bound, w.ints(-1, *[1] * len(self.window.stride)))
        return _clamp(w, y, bound, self.dtype, scalar)  # a code of -128 is beyond the bound

    def _convolved_codes(
        self, w: Writer, x: ir.Value, codes: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes of input and weight whose products no kernel saturates, and the weight's code of 0.

        Groups have few inputs each, and depthwise kernels one, so halves would cost more than
        unsigned weights, which kernels multiply in 32 bits.
        """
        if self.spec.groups == 1:
            codes = w.op("Cast", codes, to=ir.DataType.INT8)
            none = w.op("Constant", value=ir.tensor(np.array(0, np.int8)))
            return *self.in_pairs(w, x, codes, 1), none
        whole = w.op("Cast", codes, to=ir.DataType.INT32)
        middle = w.op("Constant", value=ir.tensor(np.array(_CODES + 1, np.int32)))
        unsigned = w.op("Cast", w.op("Add", whole, middle), to=ir.DataType.UINT8)
        return x, unsigned, self.zero_point(w)
