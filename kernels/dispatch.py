"""Which implementation serves a product: the Triton kernels, or torch.

The choice is made from what is known without data (device, dtype, the site's scalars), so that a
fake tensor gets the shapes that the real one will. Triton is imported on the first product that it
serves.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analogfx import versions
from analogfx.errors import KernelError
from analogfx.kernels import clip, conv, experts, linear, plan, statistics
from analogfx.kernels.operands import Gradients, Operands
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec, reference_only

CHOICES = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)

asked = "auto"
"""What :func:`use` was told."""


def use(which: str) -> str:
    """Choose what computes analog products, for the whole process.

    Args:
        which: "auto": the Triton kernels for CUDA tensors wherever they serve, torch elsewhere.
            "triton": the kernels, or a :class:`KernelError` that says why not. "reference": torch.

    Returns:
        The choice so far, to go back to it.

    Raises:
        ValueError: another choice. Choose before a model is compiled: a graph keeps the shapes
            that the choice gave it.
    """
    global asked
    if which not in CHOICES:
        raise ValueError(f"expected one of {', '.join(CHOICES)}, found {which!r}")
    before, asked = asked, which
    return before


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, as decided when triton was imported."""
    from analogfx.kernels.triton.launch import is_interpreted
    from analogfx.kernels.triton.weights import row_max

    return is_interpreted(row_max)


def _refused_device(device: torch.device) -> str:
    if not _installed():
        return "triton is not installed"
    if reason := versions.too_old("triton"):
        return reason
    if device.type == "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1" and _interpreted():
            return "TRITON_INTERPRET is set, and the interpreter is for the CPU"
        if torch.version.hip is not None:
            return "the kernels are for NVIDIA GPUs"
        if torch.cuda.is_available() and _capability(device.index) < CAPABILITY:
            return f"the GPU is older than compute capability {'.'.join(map(str, CAPABILITY))}"
        return ""
    # The interpreter is chosen before triton is imported; it changes where kernels run, not what
    # they compute, and only who asks for triton gets it.
    interpreted = asked == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and interpreted and _interpreted():
        return ""
    return f"the tensors are on {device.type}, not on a CUDA device"


def refusal(op: str, x: Tensor, weight: Tensor, *scalars: Any) -> str:
    """Why the kernels cannot serve a product; empty where they can.

    Args:
        op: "linear", "conv" or "experts".
        scalars: what describes the site: a spec, after the window of a convolution or the offsets
            of experts.
    """
    if reason := _refused_device(x.device):
        return reason
    return TABLE[op, "triton"].refusal(x, weight, *scalars)


def _refused_linear(x: Tensor, weight: Tensor, spec: MVMSpec) -> str:
    if reason := _refused_dtypes(x, weight):
        return reason
    if spec.groups != 1:
        return f"the product has {spec.groups} groups: the kernels take one matrix"
    return _refused_tiles(spec)


def _refused_conv(x: Tensor, weight: Tensor, *scalars: Any) -> str:
    if reason := _refused_dtypes(x, weight):
        return reason
    if x.dim() > 2 and x[:1].numel() >= 1 << 31:
        return "an image has 2**31 elements or more: the kernels count them in 32 bits"
    return _refused_tiles(scalars[-1])


def _refused_experts(x: Tensor, weight: Tensor, *scalars: Any) -> str:
    return _refused_linear(x, weight, experts.of_one(scalars[-1], weight.shape[0]))


def _refused_dtypes(x: Tensor, weight: Tensor) -> str:
    if weight.dtype != x.dtype and not _refused_dtype(x.dtype):
        return f"the input is {x.dtype}, the weight {weight.dtype}"
    return _refused_dtype(x.dtype)


def _refused_dtype(dtype: torch.dtype) -> str:
    if dtype in DTYPES:
        return ""
    return f"the kernels compute in float32, float16 and bfloat16, not {dtype}"


def _refused_tiles(spec: MVMSpec) -> str:
    if reason := reference_only(spec):
        return reason
    if spec.sums:
        return "other processes multiply the same inputs: the kernels do not stop at the DAC"
    if spec.part:
        return "the matrix is a part of one: the kernels draw noise and take maxima of a whole"
    if spec.activation:
        return f"the kernels end with the bias, not with {spec.activation}"
    largest, count = max(spec.in_sizes), len(spec.in_sizes)
    larger = spec.in_sizes.count(largest)
    if spec.in_sizes != [largest] * larger + [largest - 1] * (count - larger):
        return "the tiles' sizes are not the even split, larger ones first"
    return ""


def serves(reason: str) -> bool:
    """Whether the kernels are to be used where they refuse for a reason, or for none.

    Raises:
        KernelError: they were asked for and refuse.
    """
    if asked == "triton" and reason:
        raise KernelError(f'use("triton"), but {reason}; use("auto") falls back to torch')
    return asked != "reference" and not reason


def serves_whole(op: str, x: Tensor, weight: Tensor, spec: MVMSpec) -> bool:
    """Whether the kernels are to serve a product at inference, and leave torch nothing of it.

    Where torch computes the product itself, weights that are held from call to call are faster.

    Raises:
        KernelError: the kernels were asked for and refuse.
    """
    whole = op != "conv" or plan.fuses_conv(x.dtype, spec) or asked == "triton"
    return serves(refusal(op, x, weight, spec)) and whole


def chosen(weight: Tensor, spec: MVMSpec, op: str = "linear") -> str:
    """What computes a site's product, for a report: the kernels and how, or torch and why.

    Args:
        weight: taken for an input, too: inputs are to have its dtype and device.
        op: "linear", "conv" or "experts".
    """
    reason = "it was asked for" if asked == "reference" else refusal(op, weight, weight, spec)
    return f"torch: {reason}" if reason else plan.described(op, weight.dtype, spec)


def clip_rows(matrix: Tensor, sigma: float) -> None:
    """Clamp every row of a weight (O, I) in place; see ``clip.clip_rows``."""
    reason = _refused_device(matrix.device) or _refused_dtype(matrix.dtype)
    _module(reason, "clip", clip).clip_rows(matrix, sigma)


def _module(reason: str, name: str, otherwise: ModuleType) -> ModuleType:
    if not serves(reason):
        return otherwise
    return importlib.import_module(f"analogfx.kernels.triton.{name}")


class Implementation(NamedTuple):
    """How one implementation computes the product of one op: a row of the table.

    Every function takes (x, weight, *scalars). The module has ``forward(site, *scalars)`` and
    ``backward(grad, site, clipped, modified, needs, *scalars)``, of :class:`Operands`.
    """

    refusal: Callable[..., str]
    """Why it cannot serve a product; empty where it can. The device has been asked about."""
    clipped_shape: Callable[..., Sequence[int]]
    """Shape of what marks clipped outputs."""
    keeps_weight: Callable[..., bool]
    """Whether the noisy weights stay until the backward."""
    module: str
    """The module of its ``forward`` and ``backward``, imported when it first serves."""


def _keeps_weight(x: Tensor, weight: Tensor, *scalars: Any) -> bool:
    return linear.keeps_weight(weight, scalars[-1])


TABLE: dict[tuple[str, str], Implementation] = {
    ("linear", "triton"): Implementation(
        _refused_linear,
        plan.marks_shape,
        lambda *_: False,
        "analogfx.kernels.triton.linear",
    ),
    ("experts", "triton"): Implementation(
        _refused_experts,
        plan.expert_marks_shape,
        lambda *_: False,
        "analogfx.kernels.triton.experts",
    ),
    ("linear", "torch"): Implementation(
        lambda *_: "", linear.clipped_shape, _keeps_weight, "analogfx.kernels.linear"
    ),
    ("conv", "triton"): Implementation(
        _refused_conv, conv.clipped_shape, lambda *_: False, "analogfx.kernels.triton.conv"
    ),
    ("conv", "torch"): Implementation(
        lambda *_: "", conv.clipped_shape, _keeps_weight, "analogfx.kernels.conv"
    ),
    ("experts", "torch"): Implementation(
        lambda *_: "", experts.clipped_shape, _keeps_weight, "analogfx.kernels.experts"
    ),
}
"""By op and implementation. A kernel for another product is a file and a row."""


def _implementation(op: str, x: Tensor, weight: Tensor, *scalars: Any) -> Implementation:
    return TABLE[op, "triton" if serves(refusal(op, x, weight, *scalars)) else "torch"]


@functools.lru_cache(maxsize=16)
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


def clipped_shape(op: str, x: Tensor, weight: Tensor, *scalars: Any) -> tuple[int, ...]:
    """Shape of what marks clipped outputs."""
    return tuple(_implementation(op, x, weight, *scalars).clipped_shape(x, weight, *scalars))


def keeps_weight(op: str, x: Tensor, weight: Tensor, *scalars: Any) -> bool:
    """Whether the noisy weights stay until the backward."""
    return _implementation(op, x, weight, *scalars).keeps_weight(x, weight, *scalars)


def forward(op: str, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The product of one site, of :class:`Operands` and its scalars one by one."""
    site, scalars = Operands(x, weight, *rest[:4]), rest[4:]
    chosen = _implementation(op, x, weight, *scalars)
    return _load(chosen.module).forward(site, *scalars)


def backward(op: str, grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    """Its gradients.

    Args:
        rest: range, clip and seed; what the forward kept; what is needed; the scalars.
    """
    *state, clipped, modified, needs = rest[:6]
    scalars, site = rest[6:], Operands(x, weight, None, *state)
    chosen = _implementation(op, x, weight, *scalars)
    # The choice may have been another in the forward.
    if tuple(clipped.shape) != tuple(chosen.clipped_shape(x, weight, *scalars)):
        clipped = clipped.new_empty(0)
    return _load(chosen.module).backward(grad, site, clipped, modified, needs, *scalars)


def update_range(
    x: Tensor,
    input_range: Tensor,
    count: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    range_mode: str,
    groups: int,
    in_sizes: list[int],
    window: Window | None,
    *settings: Any,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranges after one more training forward; see ``statistics.update_range``.

    Args:
        offsets: of a layer of experts, see ``experts.update_range``; None for other sites.
    """
    if offsets is not None:
        state = (input_range, count, x_min, x_max)
        return experts.update_range(x, offsets, *state, range_mode, in_sizes, *settings)
    module: ModuleType = statistics
    if window is None:  # those of patches are taken of the image, by torch
        reason = refusal("linear", x, x, MVMSpec(in_sizes, [0], groups))
        module = _module(reason, "statistics", statistics)
    return module.update_range(
        x, input_range, count, x_min, x_max, range_mode, groups, in_sizes, window, *settings
    )
