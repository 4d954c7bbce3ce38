"""A driven module's graph as the calls that its driver makes.

What is traced of such a module is a tuple of products, each of an input of its own. A graph of
them is cut into one for each product, whatever the passes made of it: explicit, fused, watched, or
on what a chip holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.fx import Graph, Node

from analogfx.config import Resolved
from analogfx.kernels import recurrence
from analogfx.kernels.spec import MVMSpec, encode, reference_only
from analogfx.modules.capture import bind, forward_of
from analogfx.modules.kinds import DRIVERS
from analogfx.ops import operands
from analogfx.ops.transforms import in_transform
from analogfx.passes.cells import State
from analogfx.passes.recurrent import Direction
from analogfx.state import COUNT, StateNames

Apart = Callable[[nn.Module, int], bool]
"""Whether the numbers of a product of a module depend on which calls its inputs are spread over."""


def is_driven(module: nn.Module) -> bool:
    """Whether a driver calls a module's products."""
    return forward_of(module) in DRIVERS


def bound(
    module: nn.Module,
    graph: Graph,
    apart: Apart = lambda module, number: True,
    whole: Whole | None = None,
) -> Callable[..., Any]:
    """A graph's code as the forward of modules like one: their first argument is the module.

    Args:
        apart: see :data:`Apart`; for a driven module.
        whole: what runs many of its products in one call.
    """
    driver = DRIVERS.get(forward_of(module))
    if driver is None:
        return bind(graph)
    runs = [bind(piece) for piece in pieces(graph)]
    leading = len(graph.find_nodes(op="placeholder")) - 1

    @_disable_dynamo
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls = _Calls(module, runs, args[:leading], apart, whole)
        return driver.run(module, calls, args[leading:], kwargs)

    return run


def spread(states: Sequence[StateNames], config: Resolved | None, training: bool) -> Apart:
    """When the calls that a site's inputs are spread over change its numbers.

    They do while noise of the weights is drawn and while statistics are taken, once for each call,
    and where a range's gradient has a decay, once for each call.
    """

    def apart(module: nn.Module, number: int) -> bool:
        if config is None:
            return False
        if training and config.noise_std:
            return True
        if not (states and config.has_state):
            return False
        names = states[number]
        if training and _may_count(getattr(module, names.of(COUNT)), config.init_from_data):
            return True
        learns: bool = getattr(module, names.input_range).requires_grad
        return bool(config.decay) and learns and torch.is_grad_enabled()

    return apart


def _may_count(count: Tensor, init_from_data: int) -> bool:
    """Whether a training forward may take statistics; not read from a GPU, which would wait."""
    return init_from_data > 0 and (
        count.device.type != "cpu" or bool((count < init_from_data).any())
    )


class DrivenSite(NamedTuple):
    """What one op for many calls needs to know of one product of a driven module."""

    weight: Callable[[nn.Module], Tensor]
    bias: str | None
    """Its name in the module."""
    state: StateNames
    spec: MVMSpec
    text: str
    """The spec, encoded."""


class Whole:
    """Runs a layer of a recurrence in one direction as one op, where that is the same."""

    def __init__(self, sites: list[DrivenSite], config: Resolved, training: bool) -> None:
        self._sites, self._config, self._training = sites, config, training

    def __call__(
        self, module: nn.Module, direction: Direction, rows: Tensor, sizes: list[int], state: State
    ) -> tuple[Tensor, State] | None:
        """See ``Products.whole``."""
        # Who watches ops (an audit, a FLOP counter, fake tensors) is shown those of the sites.
        watched = torch._C._len_torch_dispatch_stack() > 0 or torch.compiler.is_compiling()
        sites = [self._sites[number] for number in direction.numbers]
        if watched or in_transform() or not self._closed(module, sites):
            return None
        x = operands.autocast(rows)
        held = [self._operands(module, site) for site in sites]
        if any(t.dtype != x.dtype for one in held for t in one[:2] if t is not None):
            return None  # a single call says what is wrong
        keep = torch.is_grad_enabled()
        drawn = any(site.spec.noise_std or site.spec.out_noise for site in sites)
        if (keep or drawn) and recurrence.refusal(
            max(sizes), [(site.spec, x.dtype, x.device) for site in sites]
        ):
            return None
        h, c = (*(part.to(x.dtype) for part in state), None)[:2]
        absent = 3 - len(sites)
        seed = torch.ops.analogfx.draw_seed.default(x.detach()) if drawn else None
        out, *after = torch.ops.analogfx.analog_recurrence.default(
            x, h, c,
            *(t for one in held for t in one), *[None] * (4 * absent),
            seed, sizes, direction.reverse, keep, direction.kind,
            *(site.text for site in sites), *[""] * absent,
        )  # fmt: skip
        return out, tuple(after[: len(state)])

    def _closed(self, module: nn.Module, sites: list[DrivenSite]) -> bool:
        """Whether the ranges hold for the whole call, and nobody asks what it sees."""
        if not (self._training and self._config.has_state):
            return True
        counts = [getattr(module, site.state.of(COUNT)) for site in sites]
        init = self._config.init_from_data
        return not self._config.collects and not any(_may_count(c, init) for c in counts)

    def _operands(self, module: nn.Module, site: DrivenSite) -> tuple[Tensor | None, ...]:
        """Weight, bias, range and clip."""
        r = getattr(module, site.state.input_range, None)
        return (
            operands.autocast(site.weight(module)),
            None if site.bias is None else operands.autocast(getattr(module, site.bias)),
            None if r is None else r.abs(),
            getattr(module, site.state.clip, None),
        )


def whole_of(
    module: nn.Module,
    sites: Sequence[tuple[Callable[[nn.Module], Tensor], StateNames, MVMSpec]],
    config: Resolved,
    training: bool,
) -> Whole | None:
    """What runs the products of modules like one in few calls, if they are driven.

    Args:
        sites: for every product that became one fused op its weight, state and spec.
    """
    driver = DRIVERS.get(forward_of(module))
    if driver is None:
        return None
    biases = driver.biases(module)
    # What only the reference computes goes step by step.
    if len(biases) != len(sites) or any(reference_only(spec) for _, _, spec in sites):
        return None
    made = [
        DrivenSite(weight, bias, state, spec, encode(spec))
        for bias, (weight, state, spec) in zip(biases, sites, strict=True)
    ]
    return Whole(made, config, training)


class _Calls:
    """The products of one call of a driven module."""

    def __init__(
        self,
        module: nn.Module,
        runs: list[Callable[..., Any]],
        given: tuple[Any, ...],
        apart: Apart,
        whole: Whole | None,
    ) -> None:
        self._module, self._runs, self._given, self._apart = module, runs, given, apart
        self._whole = whole

    def __call__(self, number: int, x: Tensor) -> Tensor:
        y: Tensor = self._runs[number](self._module, *self._given, x)
        return y

    def apart(self, number: int) -> bool:
        return self._apart(self._module, number)

    def whole(self, direction: Direction, rows: Tensor, sizes: list[int], state: State) -> Any:
        if self._whole is None:
            return None
        return self._whole(self._module, direction, rows, sizes, state)


def pieces(graph: Graph) -> list[Graph]:
    """A driven module's graph, cut: one graph for each product, whose last input is its own.

    A node without users, such as one that stores a range, goes to the product whose input it needs.
    """
    *_, inputs = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    sinks = [n for n in graph.nodes if not n.users and n.op not in ("placeholder", "output")]
    made = []
    for number, product in enumerate(output.args[0]):
        mine = [n for n in inputs.users if n.args[1] == number]
        kept = _ancestors([product])
        for sink in sinks:
            needed = _ancestors([sink])
            kept |= needed if needed.intersection(mine) else set()
        made.append(_piece(graph, kept, inputs, mine, product))
    return made


def _piece(graph: Graph, kept: set[Node], inputs: Node, mine: list[Node], product: Node) -> Graph:
    piece = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in mine:
            copies[node] = copies[inputs]
        elif node in kept or node.op == "placeholder":
            copies[node] = piece.node_copy(node, copies.__getitem__)
    piece.output(copies[product])
    return piece


def _ancestors(nodes: list[Node]) -> set[Node]:
    """Nodes and all that they are computed from."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
