"""What a pass is, and what passes know.

A pass is a function ``(graph, context) -> int``: it rewrites an ``fx.Graph`` in place and returns
how many sites it changed. It may rely on what earlier passes of the pipeline left behind, and it
keeps three promises that the tests check: the graph stays well formed, it
computes what it computed before (up to the analog effects that ``insert`` adds on purpose), and a
second run changes nothing.

Whoever captured the graph (an analogized module, a compiler, an exporter) marks the nodes that
bring parameters and buffers in, see ``stationary.py``; that is all a pass knows of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from analogfx import ops  # noqa: F401 (registers the dialect)
from analogfx.config import Resolved
from analogfx.passes.stationary import weight_value
from analogfx.state import StateNames

CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
"""The canonical convolutions and their spatial axes."""


EXPERTS: Any = torch.ops.analogfx.digital_experts.default
"""The canonical product of a layer of experts: ``(x (N, I), W (E, O, I), bias, offsets (E,))``."""


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
    where: str = field(default="", compare=False, repr=False)
    """File and line of the statement, where they are known."""


@dataclass(frozen=True)
class SiteReport(Decision):
    """Where one product with a parameter went.

    ``name`` is the module's path, and the parameter's where the module has more than one product;
    ``decided_by`` is "capture" for a module whose graph is not to be had.
    """

    asked: bool = False
    """Whether the config itself leaves the product digital."""
    parameter: str = ""
    """Path of the parameter in the model."""
    module: str = ""
    """Path of the module whose code multiplies."""


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
    """The canonical weight: (O, I) of a linear product, (E, O, I) of experts, torch's layout of a
    convolution."""
    product: Node = field(compare=False)
    """The canonical product that the site replaces."""
    config: Resolved = field(compare=False)
    training: bool = field(compare=False)
    experts: int = 0
    """Matrices of which every row takes one; 0 for a product of one matrix, or of groups."""

    @property
    def range_shape(self) -> tuple[int, ...]:
        """Of the site's input ranges: (tiles,), or (experts, tiles) where each has its own."""
        own = self.experts and self.config.own_expert_ranges
        return (self.experts, len(self.in_sizes)) if own else (len(self.in_sizes),)


@dataclass
class Context:
    """What the passes over one graph share, and what they ask whoever captured it.

    This one answers for a module's own graph: one config and one mode for all, and state that is
    an attribute of the module.
    """

    config: Resolved | None
    """The sites' scalars; None leaves every product digital."""
    training: bool
    gradients: bool = True
    """Whether the graph may be asked for gradients."""
    sites: list[Site] = field(default_factory=list)
    delegated: list[str] = field(default_factory=list)
    """Paths of children that compute products in the place of the module's own code."""
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    """(pass, node, reason) where a pass could have fired and did not."""

    def config_of(self, product: Node) -> Resolved | None:
        """The scalars of a canonical product; None leaves it digital."""
        return self.config

    def training_of(self, product: Node) -> bool:
        """The mode that a canonical product's module is in."""
        return self.training

    def packs(self, weight: Node) -> bool:
        """Whether an attention's packed weight is one matrix, and not three."""
        return self.config is not None and self.config.packed_projections

    def child_of(self, product: Node) -> str | None:
        """The path of the child whose own product a canonical product is; None for no child's."""
        return None

    def attribute(self, graph: Graph, site: Site, name: str) -> Any:
        """What stands for an attribute of the site's module, at the insertion point."""
        return graph.create_node("get_attr", name)

    def path(self, graph: Graph, site: Site) -> Any:
        """What stands for the path of the site's module in messages, at the insertion point."""
        return ""

    def same_value(self, first: Node, second: Node) -> bool:
        """Whether two frozen nodes hold the same values."""
        return first is second

    def note(self, decided_by: str, node: Node, reason: str) -> None:
        """Say why a pass left a node as it is."""
        self.notes.append((decided_by, node.name, reason))


def is_canonical(node: Node) -> bool:
    """Whether a node is a product with a parameter in the form that ``normalize`` gives it."""
    known = node.target in (F.linear, EXPERTS) or node.target in CONVOLUTIONS
    return node.op == "call_function" and known and weight_value(node.args[1]) is not None


def split_sizes(size: int, limit: int) -> list[int]:
    """Sizes of the tiles that one axis is cut into: as equal as can be, larger ones first.

    Args:
        size: length of the axis.
        limit: largest tile, or <= 0 for a single tile.
    """
    count = math.ceil(size / limit) if limit > 0 and size > 0 else 1
    base, extra = divmod(size, count)
    return [base + (i < extra) for i in range(count)]


def refuse(node: Node, kind: str, reason: str, decided_by: str) -> None:
    """Note on a product's node that it stays digital, and why.

    One op may multiply by several matrices, as a recurrent layer does: the largest is what the
    node is reported by, the others follow it.
    """
    operands = [
        n.meta.get("cut_from", n.meta.get("gathered_from", n)) for n in node.all_input_nodes
    ]
    weights = [n for n in operands if weight_value(n) is not None]
    weights.sort(key=lambda n: n.meta["stationary"].numel(), reverse=True)
    matrices = [n for n in weights[1:] if n.meta["stationary"].dim() > 1]
    node.meta["decision"], *node.meta["further_decisions"] = (
        Decision(
            name=weight.meta["parameter"],
            kind=kind,
            weight_shape=tuple(weight.meta["stationary"].shape),
            tile_grid=(0, 0),
            status="digital",
            reason=reason,
            decided_by=decided_by,
            where=where_of(node),
        )
        for weight in (weights[0], *matrices)
    )


def where_of(node: Node) -> str:
    """File and line of the statement that made a node, empty if nobody noted it."""
    if "where" in node.meta:
        return str(node.meta["where"])
    # A compiler notes the whole stack, the statement itself last.
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{found[-1][0].rpartition('/')[2]}:{found[-1][1]}" if found else ""


def decisions_of(node: Node) -> list[Decision]:
    """What was decided about the products of one node; nothing for a node that is none."""
    meta = node.meta
    return [meta["decision"], *meta.get("further_decisions", ())] if "decision" in meta else []


_ORIGIN = ("nn_module_stack", "from_fused", "recompute", "ac_graph_id", "where", "stack_trace")


def keep_origin(node: Node, origin: Node) -> None:
    """Note on a node what a compiler has noted on the one that it stands for.

    The module that it belongs to, and whether a backward computes it again.
    """
    node.meta |= {key: origin.meta[key] for key in _ORIGIN if key in origin.meta}


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
        kept = node.meta.get("frozen")  # which may have been compared with another value
        if ours and not kept and not node.users and node.op != "placeholder":
            graph.erase_node(node)
