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
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from analogfx.errors import KernelError
from analogfx.kernels import clip, plan, statistics
from analogfx.kernels import linear as plain
from analogfx.kernels.linear import Gradients
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import MVMSpec

CHOICES = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)

_chosen = "auto"


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
    global _chosen
    if which not in CHOICES:
        raise ValueError(f"expected one of {', '.join(CHOICES)}, found {which!r}")
    before, _chosen = _chosen, which
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
    asked = _chosen == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and asked and _interpreted():
        return ""
    return f"the tensors are on {device.type}, not on a CUDA device"


def refusal(x: Tensor, weight: Tensor, spec: MVMSpec) -> str:
    """Why the kernels cannot serve a linear product; empty where they can."""
    if reason := _refused_device(x.device):
        return reason
    if reason := _refused_dtype(x.dtype):
        return reason
    if weight.dtype != x.dtype:
        return f"the input is {x.dtype}, the weight {weight.dtype}"
    if spec.groups != 1:
        return f"the product has {spec.groups} groups: the kernels take one matrix"
    return _refused_tiles(spec)


def _refused_dtype(dtype: torch.dtype) -> str:
    if dtype in DTYPES:
        return ""
    return f"the kernels compute in float32, float16 and bfloat16, not {dtype}"


def _refused_tiles(spec: MVMSpec) -> str:
    if spec.activation:
        return f"the kernels end with the bias, not with {spec.activation}"
    largest, count = max(spec.in_sizes), len(spec.in_sizes)
    larger = spec.in_sizes.count(largest)
    if spec.in_sizes != [largest] * larger + [largest - 1] * (count - larger):
        return "the tiles' sizes are not the even split, larger ones first"
    return ""


def refused_convolution(x: Tensor) -> str:
    """Why the kernels cannot serve a convolution whose patches are not made."""
    return _refused_device(x.device) or "a convolution runs through torch's own"


def serves(reason: str) -> bool:
    """Whether the kernels are to be used where they refuse for a reason, or for none.

    Raises:
        KernelError: they were asked for and refuse.
    """
    if _chosen == "triton" and reason:
        raise KernelError(f'use("triton"), but {reason}; use("auto") falls back to torch')
    return _chosen != "reference" and not reason


def chosen(weight: Tensor, spec: MVMSpec, is_conv: bool = False) -> str:
    """What computes a site's product, for a report: the kernels and how, or torch and why.

    Args:
        weight: taken for an input, too: inputs are to have its dtype and device.
    """
    if _chosen == "reference":
        reason = "it was asked for"
    else:
        reason = refused_convolution(weight) if is_conv else refusal(weight, weight, spec)
    return f"torch: {reason}" if reason else plan.described(weight.dtype, spec)


def clip_rows(matrix: Tensor, sigma: float) -> None:
    """Clamp every row of a weight (O, I) in place; see ``clip.clip_rows``."""
    reason = _refused_device(matrix.device) or _refused_dtype(matrix.dtype)
    _module(reason, "clip", clip).clip_rows(matrix, sigma)


def _module(reason: str, name: str, otherwise: ModuleType) -> ModuleType:
    if not serves(reason):
        return otherwise
    return importlib.import_module(f"analogfx.kernels.triton.{name}")


def clipped_shape(x: Tensor, weight: Tensor, spec: MVMSpec) -> tuple[int, ...]:
    """Shape of what marks clipped outputs; see ``linear.clipped_shape``, ``plan.marks_shape``."""
    if not serves(refusal(x, weight, spec)):
        return plain.clipped_shape(x, weight, spec)
    return plan.marks_shape(x, weight, spec)


def keeps_weight(x: Tensor, weight: Tensor, spec: MVMSpec) -> bool:
    """Whether the noisy weights stay until the backward."""
    return plain.keeps_weight(weight, spec) and not serves(refusal(x, weight, spec))


def forward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The linear product of one site; see ``linear.forward``."""
    spec = rest[-1]
    module = _module(refusal(x, weight, spec), "linear", plain)
    return module.forward(x, weight, *rest)


def backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    """Its gradients; see ``linear.backward``."""
    *state, clipped, modified, needs, spec = rest
    if clipped.shape != clipped_shape(x, weight, spec):  # the choice was another in the forward
        clipped = clipped.new_empty(0)
    module = _module(refusal(x, weight, spec), "linear", plain)
    return module.backward(grad, x, weight, *state, clipped, modified, needs, spec)


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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranges after one more training forward; see ``statistics.update_range``."""
    if window is not None:
        reason = refused_convolution(x)
    else:
        reason = refusal(x, x, MVMSpec(in_sizes, [0], groups))
    return _module(reason, "statistics", statistics).update_range(
        x, input_range, count, x_min, x_max, range_mode, groups, in_sizes, window, *rest
    )
