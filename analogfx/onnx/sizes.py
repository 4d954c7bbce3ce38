"""Which sizes of a file's inputs are free."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from analogfx.errors import OnnxError
from analogfx.onnx.arguments import at_least_two, bound, dynamic_axes, free_axes, tensors_of
from analogfx.onnx.calls import SiteCall
from analogfx.onnx.capture import Captured, capture, line


def capture_sized(
    analog: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    opset: int,
) -> Captured:
    """Capture with free axes if asked for, with fixed ones where the model allows no others.

    Raises:
        OnnxError: as :func:`analogfx.onnx.capture.capture`, or the model has a graph, but not with
            the ``dynamic_shapes`` that were given.
    """
    if dynamic_shapes is not True:
        return _as_asked(analog, args, kwargs, dynamic_shapes or None, opset)
    wide_args, wide_kwargs = at_least_two((args, dict(kwargs)))
    arguments = bound(analog, wide_args, wide_kwargs)
    reason = "the model's code takes a size as a number, or the size is 1"
    try:
        captured = capture(analog, wide_args, wide_kwargs, dynamic_axes(arguments), opset)
    except OnnxError as error:
        captured, reason = capture(analog, args, kwargs, None, opset), str(error)
    tensors = tensors_of(arguments)
    _name_axes(captured.model.graph, tensors)
    fixed = _fixed_axes(captured, tensors)
    if fixed:
        warnings.warn(
            f"the file of {type(analog).__name__} takes one size alone of {', '.join(fixed)}: "
            f"{reason}; dynamic_shapes=False (--static) fixes all sizes without this warning",
            stacklevel=4,
        )
    return captured


def _as_asked(
    analog: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    opset: int,
) -> Captured:
    try:
        return capture(analog, args, kwargs, dynamic_shapes, opset)
    except OnnxError as error:
        if dynamic_shapes is None:
            raise
        capture(analog, args, kwargs, None, opset)  # tells what else is wrong, if anything is
        raise OnnxError(
            f"{type(analog).__name__} cannot be exported with these dynamic_shapes: {line(error)}. "
            "True lets the export find the free axes"
        ) from error


def _name_axes(graph: ir.Graph, arguments: Sequence[Tensor]) -> None:
    """Name the free axes, and the batch of all inputs alike: a model may never compare two."""
    names: dict[str, str] = {}
    batch = next((tensor.shape[:1] for tensor in arguments), None)
    for place, tensor in zip(graph.inputs, arguments, strict=True):
        for axis, size in enumerate(place.shape or ()):
            if not isinstance(size, ir.SymbolicDim) or str(size.value) in names:
                continue
            if axis == 0 and tensor.shape[:1] == batch:
                names[str(size.value)] = "batch"
            elif axis == 1 and "sequence" not in names.values():
                names[str(size.value)] = "sequence"
    rename_axes(graph, names)


def rename_axes(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Give the free axes of all values other names, also inside of sums of them."""
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in _values(graph):
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                named = symbol.sub(lambda found: names[found[0]], size.value)
                value.shape[axis] = named  # type: ignore[index]


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _fixed_axes(captured: Captured, arguments: Sequence[Tensor]) -> list[str]:
    """Axes that ought to be free and are not, each with its size."""
    calls = {call.node: call for call in captured.calls}
    batch = next((tensor.shape[:1] for tensor in arguments), None)
    return [
        f"{place.name} axis {axis} ({place.shape[axis]})"
        for place, tensor in zip(captured.model.graph.inputs, arguments, strict=True)
        for axis in free_axes(tensor)
        if place.shape is not None and isinstance(place.shape[axis], int)
        and not (axis == 0 and tensor.shape[:1] != batch)  # no batch after all
        and not (axis == 1 and tensor.dim() == 3 and _has_channels(place, calls))
    ]  # fmt: skip


def _has_channels(place: ir.Value, calls: Mapping[ir.Node, SiteCall]) -> bool:
    """Whether the first products that read an input are convolutions: its axis 1 is channels."""
    seen: set[ir.Node] = set()
    products: list[bool] = []
    readers = [node for node, _ in place.uses()]
    while readers:
        node = readers.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in calls:
            products.append(calls[node].is_convolution())
        elif node.op_type in ("Conv", "MatMul", "Gemm"):
            products.append(node.op_type == "Conv")
        else:
            readers += [user for value in node.outputs for user, _ in value.uses()]
    return bool(products) and all(products)
