"""The order of the passes, read like a table of contents."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph

from analogfx.passes.contract import Context, Decision, decisions_of
from analogfx.passes.convert_once import convert_once
from analogfx.passes.delegate import delegate
from analogfx.passes.epilogue import epilogue
from analogfx.passes.expand import expand
from analogfx.passes.freeze import freeze
from analogfx.passes.insert import insert
from analogfx.passes.lower import lower
from analogfx.passes.map_tiles import map_tiles
from analogfx.passes.normalize import normalize
from analogfx.passes.respell import respell
from analogfx.passes.select import select
from analogfx.passes.share_input import share_input
from analogfx.passes.skip_conversion import skip_conversion
from analogfx.passes.skip_dropout import skip_dropout
from analogfx.passes.skip_identity import skip_identity

Pass = Callable[[Graph, Context], int]

EXPLICIT: tuple[Pass, ...] = (
    expand,
    respell,
    normalize,
    delegate,
    select,
    insert,
    map_tiles,
)
"""From a captured graph to one node for every role."""

FUSED: tuple[Pass, ...] = (lower,)
"""From one node for every role to one op for every site."""


WHOLE_GRAPH: tuple[Pass, ...] = (
    skip_identity,
    skip_dropout,
    freeze,
    share_input,
    convert_once,
    epilogue,
    skip_conversion,
)
"""What only a whole model's graph allows, for a compiler."""


def run(
    passes: tuple[Pass, ...],
    graph: Graph,
    context: Context,
    after: Callable[[str, Graph, int], None] | None = None,
) -> None:
    """Run passes over a graph, in place.

    Args:
        after: called with the pass's name, the graph and the pass's count after each pass.
    """
    for step in passes:
        count = step(graph, context)
        graph.lint()
        if after is not None:
            after(pass_name(step), graph, count)


def pass_name(step: Pass) -> str:
    """What a pass is called, in messages and in files."""
    return str(getattr(step, "__name__", type(step).__name__))


def decisions(graph: Graph) -> list[Decision]:
    """What was decided about every product with a parameter in a graph, in its order."""
    return [decision for node in graph.nodes for decision in decisions_of(node)]
