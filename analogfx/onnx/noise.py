"""Noise in a file: whether a runtime can draw it, and the file without it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import NodeProto, helper

from analogfx.errors import OnnxError

NEWEST_OPSET = 21
"""ONNX Runtime has RandomNormalLike up to this one."""


def check_opset(opset: int) -> None:
    """Refuse an opset whose RandomNormalLike no runtime has.

    Raises:
        OnnxError: it is too new.
    """
    if opset > NEWEST_OPSET:
        raise OnnxError(
            f"opset = {opset}: with noise=True expected 18 to {NEWEST_OPSET}, the newest whose "
            "RandomNormalLike ONNX Runtime has"
        )


def without_draws(file: Path) -> Path:
    """A copy of a file, beside it, in which every random number is 0."""
    model = onnx.load(file, load_external_data=False)
    for part in (model.graph, *model.functions):
        nodes = list(_silenced(part.node))
        del part.node[:]
        part.node.extend(nodes)
    silent = file.with_name("silent.onnx")
    silent.write_bytes(model.SerializeToString())
    return silent


def _silenced(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        if node.op_type != "RandomNormalLike":
            yield node
            continue
        kind = {a.name: helper.get_attribute_value(a) for a in node.attribute}["dtype"]
        (y,) = node.output
        zero = helper.make_tensor("zero", kind, [1], [0.0])
        yield helper.make_node("Shape", node.input, [f"{y}_shape"])
        yield helper.make_node("ConstantOfShape", [f"{y}_shape"], [y], value=zero)
