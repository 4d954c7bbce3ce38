"""What a pass is, and what passes know.

A pass is a function ``(graph, context) -> int``: it rewrites an ``fx.Graph`` in place and returns
how many sites it changed. It may rely on what earlier passes of the pipeline left behind, and it
keeps three promises that the pipeline and the tests check: the graph stays well formed, it
computes what it computed before (up to the analog effects that ``insert`` adds on purpose), and a
second run changes nothing.

Whoever captured the graph (an analogized module, a compiler, an exporter) marks the nodes that
bring parameters and buffers in, by :func:`mark_stationary`; that is all a pass knows of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from analogfx.config import Resolved


class Refused(Exception):
    """A product cannot take the form that a pass wants; the text says why, for the report."""


@dataclass(frozen=True)
class Decision:
    """Where one product with a parameter went, and why."""

    name: str
    """The parameter's name in the captured module."""
    kind: str
    """How the product was spelled: "linear", "conv2d", "matmul", "einsum", ..."""
    weight_shape: tuple[int, ...]
    tile_grid: tuple[int, int]
    """Tiles along the inputs and along the outputs; (0, 0) for a digital product."""
    status: str
    """"analog" or "digital"."""
    reason: str
    decided_by: str
    """Name of the pass."""


@dataclass(frozen=True)
class StateNames:
    """Attributes of the module that hold a site's state, under Lightning's names."""

    prefix: str = ""

    @property
    def input_range(self) -> str:  # noqa: D102
        return f"{self.prefix}input_range"

    @property
    def count(self) -> str:  # noqa: D102
        return f"{self.prefix}input_range_update_idx"

    @property
    def x_min(self) -> str:  # noqa: D102
        return f"{self.prefix}x_min"

    @property
    def x_max(self) -> str:  # noqa: D102
        return f"{self.prefix}x_max"

    @property
    def clip(self) -> str:  # noqa: D102
        return f"{self.prefix}learnable_weight_clip"

    def all(self) -> tuple[str, ...]:
        """Every attribute name, in the order of registration."""
        return (self.input_range, self.count, self.x_min, self.x_max, self.clip)


@dataclass(frozen=True)
class Site:
    """A product of an activation with a weight-stationary operand that becomes analog."""

    decision: Decision
    index: int
    """Number of the site in its graph."""
    groups: int
    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    state: StateNames
    rearranged: bool
    """Whether the weight only rearranges a parameter's elements, so that it can be written back."""
    weight: Node = field(compare=False)
    """The canonical weight: (O, I) of a linear product, torch's layout of a convolution."""


@dataclass
class Context:
    """What the passes over one graph share."""

    config: Resolved | None
    """The site's scalars; None leaves every product digital."""
    training: bool
    sites: list[Site] = field(default_factory=list)


def split_sizes(size: int, limit: int) -> list[int]:
    """Sizes of the tiles that one axis is cut into: as equal as can be, larger ones first.

    Args:
        size: length of the axis.
        limit: largest tile, or <= 0 for a single tile.
    """
    count = math.ceil(size / limit) if limit > 0 and size > 0 else 1
    base, extra = divmod(size, count)
    return [base + (i < extra) for i in range(count)]


# ------------------------------------------------------------------- weight-stationary values


def mark_stationary(node: Node, value: Any, parameter: str | None) -> None:
    """Mark a node whose value does not depend on the model's inputs.

    Args:
        value: tensor on the meta device with the value's shape and dtype.
        parameter: the name of the parameter that it reads, None for a buffer or a constant.
    """
    node.meta["stationary"] = value
    node.meta["parameter"] = parameter


def weight_value(node: Any) -> Tensor | None:
    """The meta tensor of a node that is computed from parameters alone, else None."""
    if isinstance(node, Node) and node.meta.get("parameter") is not None:
        value = node.meta["stationary"]
        return value if isinstance(value, Tensor) else None
    return None


_CASTS = {"to", "type_as", "type", "float", "double", "half", "bfloat16"}


def without_cast(node: Node) -> Node:
    """What a node casts to another dtype, or the node itself."""
    while "cast_of" in node.meta:
        node = node.meta["cast_of"]
    return node


def sources(value: Node) -> list[Node]:
    """The nodes that a weight is computed by, in order, itself included; casts left out."""
    found: dict[Node, None] = {}
    pending = [value]
    while pending:
        node = without_cast(pending.pop())
        if node not in found:
            found[node] = None
            pending.extend(node.all_input_nodes)
    return sorted(found)


def _writes(node: Node) -> bool:
    """Whether a call changes its input in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _describes(node: Node) -> bool:
    """Whether a node's value is a shape, dtype or device, or computed from such.

    To be asked in the graph's order.
    """
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_function" and all(n.meta["describes"] for n in node.all_input_nodes)


def propagate_stationary(graph: Graph) -> None:
    """Mark every node that is computed from marked nodes alone, with its shape.

    A weight that is cast to whatever dtype the input has counts, too. A call that writes to a
    weight is not marked, so that it stays where it is; ``meta["written"]`` notes it on the weight.
    What is cut from a weight by the input's shape is no weight of a tile; ``meta["cut_from"]``
    notes the weight on it.
    """
    for node in graph.nodes:
        inputs = node.all_input_nodes
        node.meta["describes"] = _describes(node)
        if (
            "stationary" in node.meta
            or node.op not in ("call_function", "call_method")
            or not inputs
        ):
            continue
        if _writes(node):
            written = node.kwargs.get("out", node.args[0] if node.args else None)
            if weight_value(written) is not None:
                for source in sources(written):
                    source.meta["written"] = True
            continue
        cast = node.target in _CASTS and weight_value(node.args[0]) is not None
        if not all("stationary" in n.meta for n in inputs):
            if cast:  # to what an input of the model is
                node.meta["cast_of"], meta = node.args[0], node.args[0].meta
                mark_stationary(node, meta["stationary"], meta["parameter"])
                continue
            weights = [n.meta.get("cut_from", n) for n in inputs if not n.meta["describes"]]
            if len(weights) == 1 and weight_value(weights[0]) is not None:
                node.meta["cut_from"] = weights[0]
            continue
        args, kwargs = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda n: n.meta["stationary"]
        )
        try:
            if node.op == "call_function":
                value = node.target(*args, **kwargs)
            else:
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        except Exception:  # whatever it is, it is not a weight that we can reason about
            continue
        names = [n.meta["parameter"] for n in inputs if n.meta["parameter"] is not None]
        mark_stationary(node, value, names[0] if names else None)
        if cast and value.is_floating_point():
            node.meta["cast_of"] = node.args[0]


def refuse(node: Node, kind: str, reason: str, decided_by: str) -> None:
    """Note on a product's node that it stays digital, and why."""
    operands = [n.meta.get("cut_from", n) for n in node.all_input_nodes]
    weights = [n for n in operands if weight_value(n) is not None]
    largest = max(weights, key=lambda n: n.meta["stationary"].numel())
    node.meta["decision"] = Decision(
        name=largest.meta["parameter"],
        kind=kind,
        weight_shape=tuple(largest.meta["stationary"].shape),
        tile_grid=(0, 0),
        status="digital",
        reason=reason,
        decided_by=decided_by,
    )


def linear_node(graph: Graph, kind: str, x: Any, weight: Node, bias: Any = None) -> Node:
    """A canonical linear product: ``F.linear(x, weight (O, I), bias)``."""
    node = graph.call_function(F.linear, (x, weight, bias))
    node.meta["kind"] = kind
    return node


def sweep(graph: Graph) -> None:
    """Erase what a rewrite left unused, of nodes that passes made or that only read weights.

    Not ``Graph.eliminate_dead_code``: it drops in-place method calls whose result nobody reads.
    """
    for node in reversed(list(graph.nodes)):
        ours = "stationary" in node.meta or node.meta.get("made", (None, "store"))[1] != "store"
        if ours and not node.users and node.op != "placeholder":
            graph.erase_node(node)
