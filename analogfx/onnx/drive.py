"""The sites of a file by themselves, on inputs that drive their codes to the ends.

An example leaves most codes in the middle, where many a wrong kernel is right: a product that
saturates needs large codes side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from onnx import NodeProto, helper
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from analogfx.onnx.runtimes import load
from analogfx.onnx.sites import Programmed

_ROWS = 8
"""Inputs of each kind."""


def driven(site: Programmed, x: Tensor) -> Tensor:
    """Inputs of one site: at the ends of its range, all over it, and along its weights' signs.

    Args:
        x: an input that the site has seen; gives dtype, channels and at most the image's size.

    Returns:
        (rows, G I), or images (rows, C, ...) that are large enough for four steps of the window.
    """
    generator = torch.Generator().manual_seed(0)
    shape = _shape(site, x)

    def draw() -> Tensor:
        return 2 * torch.rand((_ROWS, *shape), generator=generator) - 1

    parts = [draw().sign(), 1.25 * draw(), torch.ones(1, *shape), -torch.ones(1, *shape)]
    if site.call.window is None and site.spec.groups == 1:
        parts.append(site.held()[:_ROWS].cpu().sign().to(torch.float32))
    return (torch.cat(parts) * _reach(site, x)).to(x.dtype)


def _shape(site: Programmed, x: Tensor) -> tuple[int, ...]:
    window = site.call.window
    if window is None:
        return (x.shape[-1],)
    geometry = zip(window.kernel_size, window.dilation, window.stride, strict=True)
    enough = [dilation * (size - 1) + 1 + 4 * step for size, dilation, step in geometry]
    return (x.shape[1], *map(min, x.shape[2:], enough))


def _reach(site: Programmed, x: Tensor) -> float:
    """The largest magnitude that the site's DAC, or its example, knows."""
    ranges = site.input_range() if site.spec.range_mode in ("static", "fast") else None
    known = x.abs() if ranges is None else ranges
    finite = known[known.isfinite()]
    return float(finite.max()) if finite.numel() and finite.any() else 1.0


class Driven(NamedTuple):
    """A call of a site, and what it is to be given."""

    label: str
    """Name of the call's node, or what its nodes' names begin with."""
    x: str
    """Names of its input and its output in the file."""
    y: str
    given: Tensor


def run_apart(
    file: Path, calls: Sequence[Driven], others: Collection[str], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run the sites of a file alone, each on an input of its own.

    Args:
        others: names of values that are returned, too: biases.
        inputs: of the file, by name, for biases that depend on them.

    Returns:
        Outputs of the sites, and the other values, by name.
    """
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    fed = {f"driven:{number}": call for number, call in enumerate(calls)}
    for name, call in fed.items():
        for node in graph.node:
            if node.name == call.label or node.name.startswith(f"{call.label}/"):
                node.input[:] = [name if value == call.x else value for value in node.input]
    outputs = list(dict.fromkeys([*(call.y for call in calls), *others]))
    nodes = _needed(graph.node, outputs)
    read = {name for node in nodes for name in node.input} | set(outputs)
    own = [place for place in graph.input if place.name in read]
    places = [
        helper.make_tensor_value_info(name, _type(call.given), [None] * call.given.dim())
        for name, call in fed.items()
    ]
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    alone.graph.Clear()
    alone.graph.name = graph.name
    alone.graph.node.extend(nodes)
    alone.graph.input.extend([*own, *places])
    alone.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    alone.graph.initializer.extend(t for t in graph.initializer if t.name in read)
    apart = file.with_name("apart.onnx")
    apart.write_bytes(alone.SerializeToString())
    given = [*(inputs[place.name] for place in own), *(call.given for call in calls)]
    return dict(zip(outputs, load(apart)(given), strict=True))


def _type(t: Tensor) -> int:
    return TorchTensor(t.new_empty(0)).dtype


def _needed(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
    """The nodes that outputs depend on, in order."""
    wanted, found = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            found.append(node)
            wanted.update(node.input)
    return found[::-1]
