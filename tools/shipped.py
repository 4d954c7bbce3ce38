"""Every kernel that is shipped, as ahead-of-time compilation takes it: no GPU is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analogfx.kernels import integers, plan
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.clip import clip_launch
from analogfx.kernels.triton.clipped import clipped_launch
from analogfx.kernels.triton.conv_forward import conv_launch
from analogfx.kernels.triton.forward import forward_launch, linear_forward
from analogfx.kernels.triton.input_gradient import clamp_launch, clipped_input_launch, partial_shape
from analogfx.kernels.triton.inputs import Operand, convert_launch
from analogfx.kernels.triton.launch import Launch, blocks_of, is_interpreted
from analogfx.kernels.triton.statistics import moments_launch, range_launch
from analogfx.kernels.triton.tile import Periphery
from analogfx.kernels.triton.weight_gradient import weight_launches
from analogfx.kernels.triton.weights import modify_launch, row_max_launch

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int64: "i64",
}
N, INPUTS, OUTPUTS = 8192, 4096, 4096


class Shipped(NamedTuple):
    """One kernel in one configuration."""

    name: str
    kernel: Any
    signature: dict[str, str]
    """Argument to triton's type, such as "*bf16", "i32" or "constexpr"."""
    constants: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    """Which arguments are multiples of 16, as ``triton.compiler.ASTSource`` takes it."""
    options: dict[str, int]
    dtype: str
    matrix: bool
    """Whether its products must run on tensor cores."""


def compiled_as(name: str, launch: Launch, dtype: str, matrix: bool) -> Shipped:
    """A launch as triton specialises it: strides of 1 are constants, multiples of 16 are known."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, argument in enumerate(launch.kernel.arg_names):
        value = launch.args.get(argument)
        if argument in launch.constants or value is None or (type(value) is int and value == 1):
            signature[argument] = "constexpr"
            constants.setdefault(argument, value)
            continue
        if isinstance(value, Tensor):
            signature[argument] = f"*{_TYPES[value.dtype]}"
        else:
            signature[argument] = "i32" if value < 1 << 31 else "i64"
        if isinstance(value, Tensor) or value % 16 == 0:
            attrs[(position,)] = [["tt.divisibility", 16]]
    return Shipped(
        name,
        launch.kernel,
        signature,
        constants,
        attrs,
        launch.options,
        dtype,
        matrix,
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _even(total: int, tiles: int) -> list[int]:
    return [total // tiles] * tiles


def _spec(tiles: int = 1, inputs: int = INPUTS, **scalars: Any) -> MVMSpec:
    """A site like those of the Analog Foundation Models."""
    values = {"range_mode": "static", "inp_res": 254.0, **scalars}
    return MVMSpec(_even(inputs, tiles), [OUTPUTS], **values)


ADC: dict[str, Any] = {"out_bound": 14.0, "out_res": 254.0}
SITES = {
    "1 tile": _spec(),
    "8 tiles, ADC": _spec(8, **ADC),
    "8 tiles, ADC, output noise": _spec(8, **ADC, out_noise=0.05),
    "8 tiles, dynamic": _spec(8, **{**ADC, "range_mode": "dynamic"}),
    "7 tiles, uneven": MVMSpec(
        [586] + [585] * 6, [OUTPUTS], range_mode="static", inp_res=254.0, **ADC
    ),
}
"""What the products are compiled for."""

HEAVY = ("8 tiles, ADC, output noise", "7 tiles, uneven")
"""Those of them that need the most registers."""

ODD = 50257
"""Outputs that are no multiple of anything: a vocabulary."""

PRODUCTS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}


def shipped() -> Iterator[Shipped]:
    """Every kernel, block configuration and dtype.

    Raises:
        RuntimeError: this process runs the kernels in Triton's interpreter (TRITON_INTERPRET).
    """
    if is_interpreted(linear_forward):
        raise RuntimeError("the interpreter compiles nothing: run without TRITON_INTERPRET")
    yield from _weights()
    yield from _inputs()
    yield from _statistics()
    for text, dtype in PRODUCTS.items():
        for size in ("many", "few"):
            yield from _forward(text, dtype, size)
        yield from _backward(text, dtype)
    for size in ("many", "few"):
        yield from _forward("int8", torch.int8, size)
    for text in ("bf16", "fp16"):
        yield from _convolutions(text, PRODUCTS[text])


CONVOLUTIONS = {
    "3 x 3": ((256, 56, 56), 256, (3, 3), (1, 1), 1),
    "3 x 3, channels last": ((256, 56, 56), 256, (3, 3), (1, 1), 1),
    "7 x 7 of 3 channels": ((3, 224, 224), 64, (7, 7), (2, 2), 1),
    "1 x 1": ((1024, 14, 14), 512, (1, 1), (1, 1), 1),
    "one axis": ((512, 1500), 512, (3,), (2,), 1),
    "three axes": ((64, 16, 56, 56), 64, (3, 3, 3), (1, 1, 1), 1),
    "groups": ((1024, 14, 14), 1024, (3, 3), (1, 1), 32),
}
"""Image, outputs, kernel, stride and groups."""


def _convolutions(text: str, dtype: torch.dtype) -> Iterator[Shipped]:
    for name, (image, outputs, kernel, stride, groups) in CONVOLUTIONS.items():
        channels = image[0] // groups
        inputs = channels * math.prod(kernel)
        padding = [k // 2 for k in kernel]
        window = Window([*kernel], [*stride], padding, [1] * len(kernel))
        x, w = _empty(32, *image, dtype=dtype), _empty(outputs, inputs, dtype=dtype)
        y = _empty(32, outputs, *window.out_size([*image[1:]]), dtype=dtype)
        if "channels last" in name:
            x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
        scales, seed = _empty(1, outputs), _empty(dtype=torch.int64)
        for kind, fields in {"ADC": {}, "ADC, output noise": {"out_noise": 0.05}}.items():
            spec = MVMSpec(
                [inputs], [outputs], groups, "static", inp_res=254.0, keep=True, **ADC, **fields
            )
            around = Periphery(_empty(1), seed, scales, scales)
            launch = conv_launch(
                x,
                w,
                around,
                window,
                spec,
                y=y,
                block=blocks.of_conv(y, w),
                bias=_empty(outputs, dtype=dtype),
                clipped=torch.empty_like(y, dtype=torch.uint8),
            )
            yield compiled_as(f"conv_forward[{text}, {name}, {kind}]", launch, text, True)


def _weights() -> Iterator[Shipped]:
    scales = _empty(8, OUTPUTS)
    seed = _empty(dtype=torch.int64)
    for text in ("bf16", "fp16", "fp32"):
        w = _empty(OUTPUTS, INPUTS, dtype=PRODUCTS[text])
        yield compiled_as(f"row_max[{text}]", row_max_launch(w, scales, _spec(8)), text, False)
        yield compiled_as(f"clip_row[{text}]", clip_launch(w, 2.5), text, False)
        kinds = {
            "noise": (None, scales, w, _spec(8, noise_std=0.03)),
            "clip": (scales, None, w, _spec(8)),
            "quantise, noise": (scales, scales, w, _spec(8, noise_std=0.03, weight_states=254.0)),
            "codes": (scales, None, w.to(torch.int8), _spec(8, weight_states=254.0)),
        }
        for kind, (bound, noise_scale, out, spec) in kinds.items():
            launch = modify_launch(w, bound, noise_scale, seed, out, spec, codes=kind == "codes")
            yield compiled_as(f"modify_weight[{text},{kind}]", launch, text, False)


def _inputs() -> Iterator[Shipped]:
    for text in ("bf16", "fp16", "fp32"):
        x = _empty(N, INPUTS, dtype=PRODUCTS[text])
        for kind, ranges, spec in (
            ("static", _empty(8), _spec(8)),
            ("dynamic", _empty(N, 8), _spec(8, range_mode="dynamic")),
        ):
            for out, row_nan in ((x, None), (x.to(torch.int8), _empty(N))):
                launch = convert_launch(x, ranges, out, row_nan, False, spec)
                name = f"convert_input[{text} to {_TYPES[out.dtype]},{kind}]"
                yield compiled_as(name, launch, text, False)


def _statistics() -> Iterator[Shipped]:
    state = (_empty(8), _empty(8, dtype=torch.int64), _empty(8), _empty(8))
    partial = _empty(8, 256, 5)
    for text in ("bf16", "fp16", "fp32"):
        x = _empty(N, INPUTS, dtype=PRODUCTS[text])
        launch = moments_launch(x, state[1], partial, 100, _spec(8))
        yield compiled_as(f"strip_moments[{text}]", launch, text, False)
    for kind in ("static", "fast"):
        launch = range_launch(partial, state, state, kind == "fast", 100, 3.0, 0.95)
        yield compiled_as(f"new_range[{kind}]", launch, "fp32", False)


def _product(name: str, launch: Launch, text: str) -> Shipped:
    """A product's launch, compiled for a GPU whatever this process would do."""
    precision = text if text in ("tf32", "int8") else "ieee"
    launch = launch._replace(constants={**launch.constants, "PRECISION": precision})
    return compiled_as(name, launch, text, matrix=text != "fp32")


class _Variant(NamedTuple):
    """A forward product as it is called."""

    text: str
    rows: int
    outputs: int = OUTPUTS
    transposed: bool = False
    """Whether W is the transpose of a contiguous matrix, as GPT-2's Conv1D holds it."""


def _variants(text: str, size: str, site: str) -> Iterator[_Variant]:
    """The layouts that a site is compiled in: all of them where most is to be held in registers."""
    rows = 1 if size == "few" else N
    yield _Variant("", rows)
    if text == "fp16" or site not in HEAVY:
        return  # a float16 program is a bfloat16 one with another matrix instruction
    yield _Variant("odd outputs", rows, outputs=ODD)
    if text != "int8":  # codes are contiguous, and converted beforehand
        yield _Variant("transposed W", rows, transposed=True)
        if size == "many":
            yield _Variant("few outputs", rows, outputs=64)


def _forward(text: str, operand: torch.dtype, size: str) -> Iterator[Shipped]:
    for site, spec in SITES.items():
        if operand == torch.int8 and spec.out_noise:
            continue  # 8-bit inference draws no noise
        if operand == torch.int8:
            spec = spec._replace(weight_states=254.0)
        for variant in _variants(text, size, site):
            yield from _products(text, operand, site, spec, variant)


def _products(
    text: str, operand: torch.dtype, site: str, spec: MVMSpec, variant: _Variant
) -> Iterator[Shipped]:
    """The forward product of one site, and in training what finds its clipped outputs."""
    data = torch.bfloat16 if operand == torch.int8 else operand
    n, k, outputs = variant.rows, len(spec.in_sizes), variant.outputs
    w = _empty(outputs, INPUTS, dtype=operand)
    if variant.transposed:
        w = _empty(INPUTS, outputs, dtype=operand).T
    block = blocks.of_forward(_empty(n, INPUTS), w, spec)
    convert = operand != torch.int8 and not plan.prepares(n, blocks_of(outputs, block.outputs))
    x = Operand(_empty(n, INPUTS, dtype=data if convert else operand), convert, spec)
    scales = _empty(k, outputs)
    rho = integers.depth(spec) > 0
    around = Periphery(
        _empty(n, k) if spec.range_mode == "dynamic" else _empty(k),
        _empty(dtype=torch.int64),
        scales if spec.out_noise else None,
        scales if spec.out_bound else None,
        None if rho or operand != torch.int8 else scales,
        scales if rho else None,
    )
    training = spec.out_bound and operand != torch.int8
    plain = not (variant.text or text == "fp16")
    marks = _empty(k, blocks_of(n, plan.PATCH[0]), blocks_of(outputs, plan.PATCH[1]))
    marks = marks.to(torch.uint8)
    kinds = [site, variant.text, "DAC inside" if convert else ""]
    for kept in (True, False) if training and plain else (training,):
        launch = forward_launch(
            x,
            w,
            around,
            y=_empty(n, outputs, dtype=data),
            block=block,
            bias=_empty(outputs, dtype=data),
            row_nan=_empty(n) if operand == torch.int8 else None,
            marks=marks if kept else None,
        )
        kind = ", ".join(filter(None, [*kinds, "training" if kept else ""]))
        yield _product(f"linear_forward[{text},{block.text},{kind}]", launch, text)
        if kept and plain:
            bits = _empty(k, n, blocks_of(outputs, 8), dtype=torch.uint8)
            raw = Operand(_empty(n, INPUTS, dtype=data), True, spec)
            launch = clipped_launch(raw, w, around, marks=marks, bits=bits, block=block)
            kind = ", ".join(filter(None, (site, variant.text)))
            yield _product(f"linear_clipped[{text},{block.text},{kind}]", launch, text)


_LAUNCHES = ("", ", clipped")
"""The launches of a learned clip's product: blocks in which nothing was clipped, and the others."""


def _backward(text: str, dtype: torch.dtype) -> Iterator[Shipped]:
    x = _empty(N, INPUTS, dtype=dtype)
    for site, spec in SITES.items():
        if spec.out_noise:
            continue  # the backward does not know of it
        for outputs in (OUTPUTS, ODD) if spec.out_bound and text != "fp16" else (OUTPUTS,):
            yield from _gradients(text, x, outputs, site, spec)


def _gradients(text: str, x: Tensor, outputs: int, site: str, spec: MVMSpec) -> Iterator[Shipped]:
    """The backward products of one site."""
    k, dtype = len(spec.in_sizes), x.dtype
    g, w = _empty(N, outputs, dtype=dtype), _empty(outputs, INPUTS, dtype=dtype)
    dynamic = spec.range_mode == "dynamic"
    ranges = _empty(N, k) if dynamic else _empty(k)
    site += ", odd outputs" if outputs % 16 else ""
    bits = rows = across = None
    if spec.out_bound:
        bits = _empty(k, N, blocks_of(outputs, 8), dtype=torch.uint8)
        rows = _empty(k, blocks_of(N, plan.PATCH[0]), dtype=torch.uint8)
        across = _empty(k, blocks_of(outputs, plan.PATCH[1]), dtype=torch.uint8)

    block = blocks.of_input_gradient(g, spec)
    partial = None if dynamic else _empty(*partial_shape(N, spec, block))
    results: dict[str, Any] = {"dx": x, "partial": partial, "spec": spec, "block": block}
    if not dynamic:
        launch = clamp_launch(x, x, ranges=ranges, marked=rows, **results)
        yield compiled_as(f"clamp_gradient[{text},{block.text},{site}]", launch, text, False)
    if bits is not None and rows is not None:
        fixed = None if dynamic else ranges
        launch = clipped_input_launch(g, w, x, ranges=fixed, bits=bits, marked=rows, **results)
        yield _product(f"linear_backward_input[{text},{block.text},{site}]", launch, text)

    block = blocks.of_weight_gradient(g, False, spec)
    results = {"bits": bits, "marked": across, "dw": w}
    if bits is not None:  # the blocks in which something was clipped; the others are the vendor's
        values = Operand(x, False, spec)
        *_, launch = weight_launches(
            g, values, w, ranges=None, clip=None, partial=None, block=block, **results
        )
        yield _product(f"linear_backward_weight[{text},{block.text},{site}]", launch, text)
    block = blocks.of_weight_gradient(g, True, spec)
    made = weight_launches(
        g, Operand(x, True, spec), w, ranges=ranges, clip=_empty(k, outputs), partial=_empty(1),
        block=block, **results,
    )  # fmt: skip
    for which, launch in zip(_LAUNCHES, made, strict=False):
        name = f"linear_backward_weight[{text},{block.text},{site}, learned clip{which}]"
        yield _product(name, launch, text)
