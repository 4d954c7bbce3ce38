"""Analog modules that run their explicit graphs and show what their tiles are given and give.

A module may have several sites, and one may read another's output: so what is watched is nodes of
the graph that the passes make, not calls of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from analogfx.config import Resolved
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.capture import Pattern, capture, pattern_of
from analogfx.modules.driven import bound
from analogfx.modules.placement import Placement
from analogfx.modules.program import ModuleContext, Program
from analogfx.passes import pipeline
from analogfx.passes.chain import made_for, role
from analogfx.passes.contract import Site

Watch = Callable[[Graph, Site], None]
"""Puts nodes that call an observer into a graph, for one site."""

Observer = Callable[[AnalogModule, int], Callable[..., Any]]
"""Gives, for a module and the number of a site in it, what its watching nodes call."""


def inputs(graph: Graph, site: Site) -> None:
    """Show an observer the rows of a site's tiles: (..., I), or (..., groups, I) in groups.

    Of a convolution these are the patches, zeros of the padding included. Of experts, (N, I), it is
    told the offsets, too. The product goes on with what the observer returns.
    """
    nodes = made_for(graph, site)
    last = [n for n in nodes if role(n) == "input"][-1]
    readers = [user for user in last.users if role(user) != "output"]
    offsets = [n for n in nodes if role(n) == "offsets"]
    with graph.inserting_before((offsets or [last])[-1].next):
        shown = _show(graph, site, last, *offsets)
    for reader in readers:
        reader.replace_input_with(last, shown)


def outputs(graph: Graph, site: Site) -> None:
    """Show an observer, in place of every tile's ADC: its outputs, row maxima and input range."""
    for node in [n for n in made_for(graph, site) if role(n) == "adc"]:
        with graph.inserting_before(node):
            shown = _show(graph, site, *node.args[:3])
        node.replace_all_uses_with(shown)
        graph.erase_node(node)


def _show(graph: Graph, site: Site, *values: Any) -> Node:
    placement = graph.create_node("get_attr", "_analog")
    placement.meta["made"] = (site.index, "state")
    shown = graph.call_function(_call_observer, (placement, site.index, *values))
    shown.meta["made"] = (site.index, "observed")
    return shown


def _call_observer(placement: _Watched, index: int, *values: Tensor) -> Any:
    return placement.observers[index](*values)


class _Watched(Placement):
    """A placement whose calls run a watched graph in evaluation."""

    def __init__(
        self,
        placement: Placement,
        build: Callable[[nn.Module, Program, Pattern], Callable[..., Any]],
        observers: list[Callable[..., Any]],
    ) -> None:
        self.__dict__.update(placement.__dict__)
        self.observers = observers
        self._build = build

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pattern = pattern_of(module, args, kwargs) if self.takes_constants else ()
        program = self.program(module, False, pattern)
        if program is None:  # a call that no graph stands for multiplies by nothing analog
            return type(module).digital_forward(module, *args, **kwargs)  # type: ignore[attr-defined]
        return self._build(module, program, pattern)(module, *args, **kwargs)


@contextmanager
def watching(
    modules: Iterable[AnalogModule],
    watch: Watch,
    observer: Observer,
    variant: Callable[[Resolved], Resolved],
) -> Iterator[None]:
    """Inside this context the modules run watched graphs; nothing else about them changes.

    Args:
        watch: :func:`inputs` or :func:`outputs`.
        variant: what the products compute while they are watched, from their own config.
    """
    graphs: dict[int, tuple[Program, Callable[..., Any]]] = {}

    def build(module: nn.Module, program: Program, pattern: Pattern) -> Callable[..., Any]:
        # Modules that look alike share a program, and so a watched graph. The program is kept,
        # so that no other takes its number.
        if id(program) not in graphs:
            placement = module._analog
            assert isinstance(placement, Placement)
            graph = _watched_graph(module, variant(placement.resolved), pattern, watch)
            graphs[id(program)] = program, bound(module, graph)
        return graphs[id(program)][1]

    before: list[tuple[AnalogModule, Placement]] = []
    try:
        for module in modules:
            placement = module._analog
            observers = [observer(module, index) for index in range(len(placement.sites))]
            before.append((module, placement))
            module._analog = _Watched(placement, build, observers)
        yield
    finally:
        for module, placement in before:
            module._analog = placement


def _watched_graph(module: nn.Module, config: Resolved, pattern: Pattern, watch: Watch) -> Graph:
    graph = capture(module, False, pattern)
    context = ModuleContext(config, training=False, module=module)
    pipeline.run(pipeline.EXPLICIT, graph, context)
    for site in context.sites:
        watch(graph, site)
    graph.lint()
    return graph
