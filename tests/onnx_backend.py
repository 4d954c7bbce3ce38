"""A backend for the custom ops in NumPy, written from docs/onnx/ alone.

Every op takes its inputs and attributes as a node of the file has them. The sites take besides
how to bound a product: a product of floats may be summed in any order, so it is an interval, the
converters behind it are monotone, and so is the sum over tiles; a site's output is therefore an
interval, too, whose ends are apart by rounding, or at a tie of the ADC by its step.
"""

import itertools
import math

import numpy as np
from onnx import helper
from onnx.reference.op_run import OpRun

DOMAIN = "ai.analogfx"


def dynamic_range(x):
    return np.abs(x).max(-1, keepdims=True)


def dac(x, input_range, *, inp_res, clamp, codes=0):
    if clamp:
        x = np.minimum(np.maximum(x, -input_range), input_range)
    if not inp_res:
        return x
    step = _step(input_range, inp_res)
    return _codes(x, step) if codes else _codes(x, step) * step


def adc(y, input_range, weight_max, code_scale=None, *, out_bound, out_res):
    kind = input_range.dtype.type
    bound = (input_range * kind(out_bound)) * weight_max
    if out_res:
        step = _step(bound, out_res)
        step = np.where(step == 0, kind(1), step)
        y = (_codes(y, step) if code_scale is None else np.round(y * code_scale)) * step
    return np.minimum(np.maximum(y, -bound), bound)


def _step(bound, res):
    kind = bound.dtype.type
    return 2 * bound / kind(res) if res > 1 else 2 * bound * kind(res)


def _codes(x, step):
    return np.round(x / np.maximum(step, np.finfo(step.dtype).tiny))


def analog_linear(x, weight, weight_scale=None, bias=None, input_range=None, weight_max=None,
                  code_scale=None, *, group, in_sizes, around=0, **attributes):  # fmt: skip
    """``around``: take this many error bounds of every product away (-1) or to it (1)."""
    real = np.float64 if x.dtype == np.float64 else np.float32
    outputs, inputs = weight.shape[0], sum(in_sizes)
    rows = x.astype(real).reshape(*x.shape[:-1], group, inputs)
    total, start = 0, 0
    for tile, size in enumerate(in_sizes):
        columns = slice(start, start + size)
        start += size
        held = weight[:, columns].astype(real)
        if weight_scale is not None and code_scale is None:
            held = held * weight_scale[tile][:, None]
        rho = None if code_scale is None else code_scale[tile]
        x_t, r = _converted(rows[..., columns], input_range, tile, attributes, rho)
        matrices = held.reshape(group, outputs // group, size)
        y_t = _near("...gi,goi->...go", x_t, matrices, size, 0 if rho is not None else around)
        y_t = y_t.reshape(*x.shape[:-1], outputs)
        a = None if weight_max is None else weight_max[tile]
        if attributes["range_mode"] == "dynamic":  # (..., G, 1), one for each output of a group
            r = np.repeat(r[..., 0], outputs // group, axis=-1)
        total = total + _digitized(y_t, r, a, rho, attributes)
    return (total if bias is None else total + bias.astype(real)).astype(x.dtype)


def analog_conv(x, weight, weight_scale=None, bias=None, input_range=None, weight_max=None,
                code_scale=None, *, group, kernel_shape, strides, pads, dilations, around=0,
                **attributes):  # fmt: skip
    real = np.float64 if x.dtype == np.float64 else np.float32
    axes = len(kernel_shape)
    image = (-1, *[1] * axes)
    held = weight.astype(real)
    if weight_scale is not None and code_scale is None:
        held = held * weight_scale[0].reshape(-1, *[1] * (axes + 1))
    rho = None if code_scale is None else code_scale[0]
    x_t, r = _converted(x.astype(real), input_range, 0, attributes, rho)
    ends = [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)]
    patches = _patches(np.pad(x_t, ends), kernel_shape, strides, dilations)
    outputs = weight.shape[0]
    batch, channels, *places = patches.shape[: 2 + axes]
    patches = patches.reshape(batch, group, channels // group, *places, math.prod(kernel_shape))
    matrices = held.reshape(group, outputs // group, channels // group, -1)
    depth = matrices[0, 0].size
    exact = rho is not None
    y = _near("bgc...k,gock->bgo...", patches, matrices, depth, 0 if exact else around)
    y = y.reshape(batch, outputs, *places)
    a = None if weight_max is None else weight_max[0]
    y = _digitized(y, r, a, rho, attributes, image)
    return (y if bias is None else y + bias.astype(real).reshape(image)).astype(x.dtype)


def _patches(x, kernel, strides, dilations):
    """(B, C, ...) as (B, C, places ..., elements of the kernel)."""
    sizes = x.shape[2:]
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    views = []
    for offset in itertools.product(*map(range, kernel)):
        place = (
            slice(o * d, o * d + s * (count - 1) + 1, s)
            for o, d, s, count in zip(offset, dilations, strides, counts, strict=True)
        )
        views.append(x[(..., *place)])
    return np.stack(views, -1)


def _converted(x_t, input_range, tile, attributes, rho):
    """A tile's input behind the DAC (its codes where rho is given), and its range."""
    mode = attributes["range_mode"]
    if mode == "none":
        return x_t, None
    dynamic = mode == "dynamic"
    r = dynamic_range(x_t) if dynamic else input_range[tile]
    codes = rho is not None
    return dac(x_t, r, inp_res=attributes["inp_res"], clamp=not dynamic, codes=codes), r


def _near(equation, x, w, depth, around):
    """A product, exact but for its last rounding, or an end of the interval that it lies in.

    Summing n products in any order, fused or not, is off by at most n units of rounding times the
    sum of magnitudes; three more for codes that are multiplied before they are scaled.
    """
    product = np.einsum(equation, x.astype(np.float64), w.astype(np.float64))
    if around:
        size = np.einsum(equation, np.abs(x).astype(np.float64), np.abs(w).astype(np.float64))
        product = product + around * (depth + 3) * np.finfo(x.dtype).eps / 2 * size
    return product.astype(x.dtype)


def _digitized(y_t, r, weight_max, rho, attributes, image=(-1,)):
    """A tile's product behind the ADC."""
    if not attributes["out_bound"]:
        return y_t
    if attributes["bound_per_channel"]:
        a = weight_max
    else:
        ends = np.cumsum(attributes["out_sizes"])[:-1]
        a = np.concatenate([np.full_like(p, p.max()) for p in np.split(weight_max, ends)])
    rho = None if rho is None else rho.reshape(image)
    return adc(y_t, r, a.reshape(image), rho, out_bound=attributes["out_bound"],
               out_res=attributes["out_res"])  # fmt: skip


# ---------------------------------------------------------------- the ops for a stock evaluator


def _op(name, compute):
    """An op of the domain for ONNX's reference evaluator, from nothing but a node."""

    def run(self, *given, **_):
        attributes = {a.name: helper.get_attribute_value(a) for a in self.onnx_node.attribute}
        named = {
            key: value.decode() if isinstance(value, bytes) else value
            for key, value in attributes.items()
        }
        return (np.asarray(compute(*given, **named)),)

    return type(name, (OpRun,), {"op_domain": DOMAIN, "_run": run})


OPS = [
    _op("DynamicRange", dynamic_range),
    _op("DAC", dac),
    _op("ADC", adc),
    _op("AnalogLinear", analog_linear),
    _op("AnalogConv", analog_conv),
]
