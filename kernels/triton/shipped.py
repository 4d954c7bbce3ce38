"""Every kernel that is shipped, as ahead-of-time compilation takes it: no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.triton import blocks
from analogfx.kernels.triton.backward import input_launch, partial_shape, weight_launch
from analogfx.kernels.triton.forward import forward_launch, linear_forward
from analogfx.kernels.triton.inputs import convert_launch
from analogfx.kernels.triton.launch import Launch, is_interpreted
from analogfx.kernels.triton.linear import forward_blocks
from analogfx.kernels.triton.statistics import moments_launch, range_launch
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
    num_warps: int
    num_stages: int
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
        launch.num_warps,
        launch.num_stages,
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
    "7 tiles, uneven": MVMSpec([586] + [585] * 6, [OUTPUTS], range_mode="static", inp_res=254.0),
}
"""What the products are compiled for."""

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


def _weights() -> Iterator[Shipped]:
    scales = _empty(8, OUTPUTS)
    seed = _empty(dtype=torch.int64)
    for text in ("bf16", "fp16", "fp32"):
        w = _empty(OUTPUTS, INPUTS, dtype=PRODUCTS[text])
        yield compiled_as(f"row_max[{text}]", row_max_launch(w, scales, _spec(8)), text, False)
        kinds = {
            "noise": (None, scales, w, _spec(8, noise_std=0.03)),
            "clip": (scales, None, w, _spec(8)),
            "quantise, noise": (scales, scales, w, _spec(8, noise_std=0.03, weight_states=254.0)),
            "codes": (scales, None, w.to(torch.int8), _spec(8, weight_states=254.0)),
        }
        for kind, (bound, noise_scale, out, spec) in kinds.items():
            launch = modify_launch(w, bound, noise_scale, seed, out, spec)
            yield compiled_as(f"modify_weight[{text},{kind}]", launch, text, False)


def _inputs() -> Iterator[Shipped]:
    for text in ("bf16", "fp16", "fp32"):
        x = _empty(N, INPUTS, dtype=PRODUCTS[text])
        for kind, ranges, spec in (
            ("static", _empty(8), _spec(8)),
            ("dynamic", _empty(N, 8), _spec(8, range_mode="dynamic")),
        ):
            for out in (x, x.to(torch.int8)):
                launch = convert_launch(x, ranges, out, False, spec)
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
    launch.constants["PRECISION"] = text if text in ("tf32", "int8") else "ieee"
    return compiled_as(name, launch, text, matrix=text != "fp32")


def _forward(text: str, operand: torch.dtype, size: str) -> Iterator[Shipped]:
    data = torch.bfloat16 if operand == torch.int8 else operand
    convert = size == "few"
    x = _empty(N, INPUTS, dtype=data if convert else operand)
    w = _empty(OUTPUTS, INPUTS, dtype=operand)
    bias, y = _empty(OUTPUTS, dtype=data), _empty(N, OUTPUTS, dtype=data)
    seed = _empty(dtype=torch.int64)
    for site, spec in SITES.items():
        if operand == torch.int8 and spec.out_noise:
            continue  # 8-bit inference draws no noise
        k = len(spec.in_sizes)
        ranges = _empty(N, k) if spec.range_mode == "dynamic" else _empty(k)
        scales = _empty(k, OUTPUTS)
        clipped = _empty(k, N, OUTPUTS // 8, dtype=torch.uint8)
        tile = forward_blocks(operand, 1 if size == "few" else N, spec)
        for kept in (True, False) if spec.out_bound and operand != torch.int8 else (False,):
            launch = forward_launch(
                x,
                w,
                bias,
                ranges,
                scales if operand == torch.int8 else None,
                scales if spec.out_noise else None,
                scales if spec.out_bound else None,
                seed,
                y,
                clipped if kept else None,
                convert,
                spec,
                tile,
            )
            kind = site + (", training" if kept else "") + (", DAC inside" if convert else "")
            yield _product(f"linear_forward[{text},{tile.text},{kind}]", launch, text)


def _backward(text: str, dtype: torch.dtype) -> Iterator[Shipped]:
    x, g = _empty(N, INPUTS, dtype=dtype), _empty(N, OUTPUTS, dtype=dtype)
    w = _empty(OUTPUTS, INPUTS, dtype=dtype)
    for site, spec in SITES.items():
        if spec.out_noise:
            continue  # the backward does not know of it
        k = len(spec.in_sizes)
        ranges = _empty(N, k) if spec.range_mode == "dynamic" else _empty(k)
        clipped = _empty(k, N, OUTPUTS // 8, dtype=torch.uint8) if spec.out_bound else None
        tile = blocks.choose("input", dtype, N)
        partial = _empty(*partial_shape(N, spec, tile))
        launch = input_launch(g, w, x, ranges, clipped, x, partial, spec, tile)
        yield _product(f"linear_backward_input[{text},{tile.text},{site}]", launch, text)

        for kind, clip, convert in (
            ("", None, False),
            (", learned clip", _empty(k, OUTPUTS), True),
        ):
            tile = blocks.choose("weight" if clip is None else "clip", dtype, N)
            launch = weight_launch(
                g, x, ranges, clipped, w, clip, w, _empty(1), convert, spec, tile
            )
            name = f"linear_backward_weight[{text},{tile.text},{site}{kind}]"
            yield _product(name, launch, text)
