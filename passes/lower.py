"""lower: a complete explicit site becomes one fused op.

The scalars are read off the chain's own nodes, not off a config, so that what is fused is what
the graph says. A chain that some other pass has changed does not match and stays explicit, where
it still runs.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

from torch.fx import Graph, Node

from analogfx import ops
from analogfx.kernels import patches
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import ROLES, MVMSpec, encode
from analogfx.passes.chain import PER_TILE, Emitter, dialect, made_for, role
from analogfx.passes.contract import Context, Site, sweep


def lower(graph: Graph, context: Context) -> int:
    """Fuse every site whose chain is complete.

    Returns:
        The number of sites fused.
    """
    return sum(_fuse(graph, site, context) for site in context.sites)


def _fuse(graph: Graph, site: Site, context: Context) -> bool:
    nodes = made_for(graph, site)
    if not _complete(site, nodes):
        return False
    out = next(n for n in reversed(nodes) if role(n) == "output")  # type_as(y, x)
    x: Any = out.args[1]
    spec, window = _spec(site, nodes), _window(nodes)
    state = (_first(nodes, "range"), _clip(nodes), _first(nodes, "seed"))
    operands = (_first(nodes, "weight"), _first(nodes, "bias"))

    with graph.inserting_before(out):
        emit = Emitter(graph, site, context)
        if site.experts:
            y = _experts(emit, x, *operands, state, _first(nodes, "offsets"), spec)
        elif window is None:
            y = _linear(emit, x, *operands, state, spec)
        elif len(site.in_sizes) == 1 and spec.range_mode != "dynamic":
            y = _convolution(emit, x, *operands, state, window, spec)
            _update_from_image(emit, _first(nodes, "update_range"), x, window)
        else:
            rows = emit.call("fused", patches.unfold_batched, x, *window)
            matrix = emit.method("fused", "flatten", operands[0], 1)
            y = _linear(emit, rows, matrix, operands[1], state, spec)
            y = emit.call("fused", patches.fold_output, y, x, *window)
    y.meta["decision"] = out.meta["decision"]
    out.replace_all_uses_with(y)
    sweep(graph)
    return True


def _linear(
    emit: Emitter, x: Node, weight: Any, bias: Any, state: tuple[Any, ...], spec: MVMSpec
) -> Node:
    fused = emit.call("fused", dialect.analog_linear.default, x, weight, bias, *state, encode(spec))
    return emit.call("fused", operator.getitem, fused, 0)


def _experts(
    emit: Emitter,
    x: Node,
    weight: Any,
    bias: Any,
    state: tuple[Any, ...],
    offsets: Any,
    spec: MVMSpec,
) -> Node:
    operands = (x, weight, bias, *state, offsets, encode(spec))
    fused = emit.call("fused", dialect.analog_experts.default, *operands)
    return emit.call("fused", operator.getitem, fused, 0)


def _convolution(
    emit: Emitter,
    x: Node,
    weight: Any,
    bias: Any,
    state: tuple[Any, ...],
    window: Window,
    spec: MVMSpec,
) -> Node:
    dims = len(window.stride)
    image = emit.call("fused", patches.with_batch, x, dims)
    inputs = (image, weight, bias, *state, encode(window), encode(spec))
    y = emit.call(
        "fused", operator.getitem, emit.call("fused", dialect.analog_conv.default, *inputs), 0
    )
    return emit.call("fused", patches.like_batch, y, x, dims)


def _update_from_image(emit: Emitter, update: Node | None, x: Node, window: Window) -> None:
    """Let the statistics see the image instead of its patches."""
    if update is None:
        return
    with emit.graph.inserting_before(update):
        image = emit.call("fused", patches.with_batch, x, len(window.stride))
        plain = emit.method("fused", "detach", image)
    update.args = (plain, *update.args[1:6], 1, update.args[7], encode(window), *update.args[9:])


def _first(nodes: list[Node], wanted: str) -> Node | None:
    return next((n for n in nodes if role(n) == wanted), None)


def _clip(nodes: list[Node]) -> Node | None:
    """The learned clips of all tiles, (k, O)."""
    clip = _first(nodes, "tile_clip")
    return None if clip is None else clip.args[0]  # type: ignore[return-value]


def _window(nodes: list[Node]) -> Window | None:
    unfold = next((n for n in nodes if n.target is patches.unfold_batched), None)
    return None if unfold is None else Window(*unfold.args[1:])  # type: ignore[arg-type]


def _complete(site: Site, nodes: list[Node]) -> bool:
    """Whether nothing but this site stands between its input and its output."""
    if not any(role(n) == "mvm" for n in nodes):
        return False  # fused already, or taken apart
    inside = {
        *nodes,
        *(n for n in nodes[0].graph.find_nodes(op="placeholder") if "state" in n.meta),
    }
    for node in nodes:
        enters = role(node) in ("input", "weight", "bias") and node.target is ops.autocast
        enters = enters or role(node) == "offsets"
        if not enters and not inside.issuperset(node.all_input_nodes):
            return False
        leaves = role(node) == "output"
        if not leaves and not inside.issuperset(node.users):
            return False
    counts = Counter(role(n) for n in nodes)
    tiles = len(site.in_sizes)
    once = counts["mvm"] == tiles and all(counts[r] in (0, tiles) for r in _ONCE_A_TILE)
    return once and all(_alike([n for n in nodes if role(n) == r]) for r in _ONCE_A_TILE)


_ONCE_A_TILE = PER_TILE - {"tile", "tile_max"}
_NUMBERED = {"tile_range": 2, "tile_clip": 2, "output_normal": 2}
"""Arguments that hold a tile's number."""


def _alike(nodes: list[Node]) -> bool:
    """Whether the nodes of one role do the same for every tile."""

    def look(node: Node) -> tuple[Any, ...]:
        number = _NUMBERED.get(role(node))
        scalars = [a for i, a in enumerate(node.args) if not isinstance(a, Node) and i != number]
        return node.target, scalars, [role(n) for n in node.all_input_nodes]

    return all(look(node) == look(nodes[0]) for node in nodes)


def _spec(site: Site, nodes: list[Node]) -> MVMSpec:
    """The scalars of a chain; every tile's are those of the first."""
    found = {name: _first(nodes, name) for name in ROLES}
    dynamic = any(n.target is dialect.dynamic_range.default for n in nodes)
    scalars: dict[str, Any] = {
        "range_mode": "dynamic" if dynamic else "none",
        "weight_per_channel": found["clip"] is not None or _per_channel(found["quantize"]),
        "noise_per_channel": _per_channel(found["weight_noise"]),
        "out_noise_per_channel": _per_channel(found["output_noise"]),
        "bound_per_channel": _per_channel(found["adc"]),
    }
    for name, node in found.items():
        if node is not None:
            plain = [a for a in node.args if not isinstance(a, Node)]
            scalars |= zip(ROLES[name].names, plain, strict=False)  # a clip's experts come last
    sizes = list(site.in_sizes), list(site.out_sizes)
    return MVMSpec(*sizes, groups=site.groups, keep=site.training, **scalars)


def _per_channel(node: Node | None) -> bool:
    """Whether a node is scaled, by its second argument, by each row's own maximum."""
    if node is None:
        return False
    scale: Any = node.args[1]
    if scale.target is dialect.expert_rows.default:
        scale = scale.args[0]
    return role(scale) == "row_max"
