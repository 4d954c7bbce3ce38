"""Whether a file computes what the model computes.

Two programs that sum the same products in another order differ by rounding, and where a converter
rounds, a difference of one bit can become a whole step. How far that may go depends on the model;
so it is measured: the model runs once more with every product of its tiles and every digital
result off by a small relative error, which is well above float rounding. A file is accepted if
it stays closer to the model than that.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.tensor_adapters import TorchTensor
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from analogfx.errors import OnnxError
from analogfx.program import explicit_level

ERROR = {
    # Not 1e-14: between sites, a double model's file is of float32 precision. ONNX's attributes are
    # float32 (the epsilon of a norm), torch's exporter writes a Python number as a float32 constant
    # and a Cast (x * 0.1), and where ONNX Runtime has no kernel for doubles (Erf, so GELU), ONNX's
    # reference evaluator takes over, whose Erf is float32's. Each is off by at most 2^-24; this is
    # two such. Sites themselves are exact to double's rounding.
    torch.float64: 1e-7,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""Relative error that is put on results, by their dtype: a few dozen units of rounding."""

_ATTEMPTS = 8
"""Draws of that error. A rounding tie falls either way, so one draw can miss what a tie does."""

_TIES = math.sqrt(2)
"""A draw moves about half of the values at a tie; another program may move all of them."""

_aten = torch.ops.aten
_SUMS = {
    torch.ops.analogfx.mvm.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default,
    _aten.baddbmm.default, _aten.convolution.default, _aten.native_layer_norm.default,
    _aten.native_group_norm.default, _aten.native_batch_norm.default, _aten._softmax.default,
    _aten._log_softmax.default, _aten.cumsum.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip
"""Beside the ops that torch itself marks as reductions."""


class _Inexact(TorchDispatchMode):
    """Puts a relative error on whatever two programs may round apart.

    A sum is off relative to all that was summed, for which the size of all results stands; an
    elementwise function, such as tanh, relative to its result.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        first, *rest = out if isinstance(out, tuple) else (out,)
        is_sum = func in _SUMS or torch.Tag.reduction in func.tags
        if not is_sum and torch.Tag.pointwise not in func.tags:
            return out
        if func._schema.is_mutable or getattr(first, "dtype", None) not in ERROR:
            return out
        inexact = self._inexact(first, is_sum)
        return (inexact, *rest) if isinstance(out, tuple) else inexact

    def _inexact(self, y: Tensor, is_sum: bool) -> Tensor:
        if y.numel() == 0:
            return y
        draw = torch.randn(y.shape, generator=self.generator).to(y)
        size = y.abs()
        if is_sum:
            size = size + y.float().square().mean().sqrt().to(y)
        return torch.where(y.isfinite(), y + draw * size * ERROR[y.dtype], y)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of nested arguments or outputs, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def bound(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of forward's parameters, in its order.

    Raises:
        OnnxError: forward takes no such call.
    """
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise OnnxError(f"{type(model).__name__}.forward: {error}") from error


def at_least_two(value: Any) -> Any:
    """Arguments with a batch of one doubled: a free axis cannot be traced at 1.

    The first tensor tells the batch; what has 1 beside a larger batch is broadcast, and stays.
    """

    def widen(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if _is_single(leaf) else leaf

    return tree_map(widen, value) if _is_single(next(iter(tensors_of(value)), None)) else value


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1


def check(file: Path, analog: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run a file on the given inputs and on other batch sizes, and compare.

    ONNX Runtime runs it; where its CPU kernels lack a type (bfloat16, mostly), ONNX's reference
    evaluator does.

    Raises:
        OnnxError: it does not run, or differs by more than rounding can explain.
    """
    run = load(file)
    for variant in _batches(_batched(file, bound(analog, args, kwargs)), args, kwargs):
        _compare(run, analog, *variant)


def _batched(file: Path, arguments: Mapping[str, Any]) -> set[int]:
    """Identities of the tensors whose first axis is the free batch of a file."""
    places = onnx.load(file, load_external_data=False).graph.input
    axes = [place.type.tensor_type.shape.dim for place in places]
    symbols = [shape[0].dim_param if shape else "" for shape in axes]
    batch = next(filter(None, symbols), None)
    tensors = tensors_of(arguments)
    return {id(t) for t, symbol in zip(tensors, symbols, strict=True) if symbol == batch}


def _batches(batched: set[int], args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """The inputs, twice the inputs, and their first alone; the inputs if no batch is free."""

    def changed(function: Any) -> tuple[Any, Any]:
        def on_batches(leaf: Any) -> Any:
            return function(leaf) if id(leaf) in batched else leaf

        return tree_map(on_batches, args), tree_map(on_batches, kwargs)

    if not batched:
        return [(args, kwargs)]
    return [
        (args, kwargs),
        changed(lambda t: torch.cat([t, t.flip(0)])),
        changed(lambda t: t[:1]),
    ]


Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""Runs a file on tensors in the order of its inputs."""


def load(file: Path) -> Run:
    """A file ready to run, in ONNX Runtime or else in ONNX's reference evaluator.

    Raises:
        OnnxError: it does not load.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; nothing need be printed, too
    # Packed copies of the weights would double the memory of a run that happens once.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    except NotImplemented:
        return reference(file)
    except Exception as error:  # its exceptions share no base class
        raise OnnxError(f"ONNX Runtime does not load the exported model: {error}") from error

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        names = [place.name for place in session.get_inputs()]
        feed = {n: _host(t).numpy() for n, t in zip(names, inputs, strict=True)}
        try:
            return [torch.from_numpy(array) for array in session.run(None, feed)]
        except Exception as error:
            raise OnnxError(f"ONNX Runtime does not run the exported model: {error}") from error

    return run


def reference(file: Path) -> Run:
    """A file in ONNX's reference evaluator, which knows every type and no overloads."""
    model = onnx.inliner.inline_local_functions(onnx.load(file))
    evaluator = ReferenceEvaluator(model)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        names = [place.name for place in model.graph.input]
        feed = {n: TorchTensor(_host(t)).numpy() for n, t in zip(names, inputs, strict=True)}
        with np.errstate(all="ignore"):
            outputs = evaluator.run(None, feed)
        return [_from_numpy(np.asarray(array)) for array in outputs]

    return run


def _host(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous()


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor; torch does not read numpy's bfloat16."""
    half = array.dtype == ir.DataType.BFLOAT16.numpy()
    return torch.from_numpy(array.astype(np.float32) if half else array)


def _compare(run: Run, analog: nn.Module, args: Any, kwargs: Any) -> None:
    inputs = tensors_of(bound(analog, args, kwargs))
    try:
        with torch.no_grad():
            expected = tensors_of(analog(*args, **kwargs))
    except Exception as error:  # whatever the model's own code raises
        raise OnnxError(
            f"{type(analog).__name__} does not take inputs of {[tuple(t.shape) for t in inputs]}, "
            f"though their first axis was exported as a free batch: {error}. Fix the shapes with "
            "dynamic_shapes=False (--static)"
        ) from error
    found = run(inputs)
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        raise OnnxError(f"the exported model returns {shapes[0]}, the model returns {shapes[1]}")
    off = [distance(f, e) for f, e in zip(found, expected, strict=True)]
    allowed = [0.0] * len(off)
    for seed in range(_ATTEMPTS):
        if all(o <= a for o, a in zip(off, allowed, strict=True)):
            return
        with torch.no_grad(), explicit_level(), _Inexact(seed):
            inexact = tensors_of(analog(*args, **kwargs))
        measured = [distance(i, e) for i, e in zip(inexact, expected, strict=True)]
        allowed = [max(a, _TIES * m) for a, m in zip(allowed, measured, strict=True)]
    worst = max(range(len(off)), key=lambda n: off[n] - allowed[n])
    if off[worst] > allowed[worst]:
        raise OnnxError(
            f"the exported model disagrees with {type(analog).__name__}: output {worst} of batch "
            f"{inputs[0].shape[0] if inputs and inputs[0].dim() else 1} is off by "
            f"{off[worst]:.3g} (rms, relative), where rounding explains {allowed[worst]:.3g}"
        )


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected; infinite for NaNs apart."""
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found.cpu(), expected.cpu()) else float("inf")
    f, e = found.double().cpu(), expected.double().cpu()
    if not torch.equal(torch.isfinite(f), torch.isfinite(e)):
        return float("inf")
    apart = torch.nan_to_num(f - e, nan=0.0, posinf=0.0, neginf=0.0)
    size = torch.nan_to_num(e, nan=0.0, posinf=0.0, neginf=0.0).square().mean().sqrt()
    return float(apart.square().mean().sqrt() / size) if size else float(apart.abs().max())
