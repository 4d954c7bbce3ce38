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
from analogfx.kernels import prepared, ready
from analogfx.kernels.spec import MVMSpec
from analogfx.modules.capture import bind, forward_of
from analogfx.modules.kinds import DRIVERS
from analogfx.ops import operands
from analogfx.state import COUNT, StateNames

Apart = Callable[[nn.Module, int], bool]
"""Whether the numbers of a product of a module depend on which calls its inputs are spread over."""


def is_driven(module: nn.Module) -> bool:
    """Whether a driver calls a module's products."""
    return forward_of(module) in DRIVERS


def bound(
    module: nn.Module, graph: Graph, apart: Apart = lambda module, number: True
) -> Callable[..., Any]:
    """A graph's code as the forward of modules like one: their first argument is the module.

    Args:
        apart: see :data:`Apart`; for a driven module.
    """
    driver = DRIVERS.get(forward_of(module))
    if driver is None:
        return bind(graph)
    runs = [bind(piece) for piece in pieces(graph)]
    leading = len(graph.find_nodes(op="placeholder")) - 1

    @_disable_dynamo
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return driver.run(
            module, _Calls(module, runs, args[:leading], apart), args[leading:], kwargs
        )

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


class _Calls:
    """The products of one call of a driven module."""

    def __init__(
        self,
        module: nn.Module,
        runs: list[Callable[..., Any]],
        given: tuple[Any, ...],
        apart: Apart,
    ) -> None:
        self._module, self._runs, self._given, self._apart = module, runs, given, apart

    def __call__(self, number: int, x: Tensor) -> Tensor:
        y: Tensor = self._runs[number](self._module, *self._given, x)
        return y

    def apart(self, number: int) -> bool:
        return self._apart(self._module, number)


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


class ReadySite(NamedTuple):
    """What inference needs to know of one product of a driven module."""

    weight: Callable[[nn.Module], Tensor]
    state: StateNames
    spec: MVMSpec


def made_ready(
    module: nn.Module, run: Callable[..., Any], sites: list[ReadySite]
) -> Callable[..., Any]:
    """A driven forward for inference: what its tiles hold is made once a call, not once a step.

    Args:
        module: of the kind.
        run: the forward for a call with gradients, or one that is traced.
    """
    driver = DRIVERS[forward_of(module)]

    @_disable_dynamo
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Who watches ops (an audit, a FLOP counter, fake tensors) is shown those of the sites.
        watched = torch._C._len_torch_dispatch_stack() > 0
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or watched:
            return run(module, *args, **kwargs)
        names = zip(sites, driver.biases(module), strict=True)
        products = _Ready([_made(module, site, bias) for site, bias in names])
        return driver.run(module, products, args, kwargs)

    return forward


class _Ready:
    """The products of one call in inference."""

    def __init__(self, sites: list[ready.Ready]) -> None:
        self._sites = sites

    def __call__(self, number: int, x: Tensor) -> Tensor:
        # Autocast has had its say about the operands: nothing below may be cast again.
        x = operands.autocast(x)
        with torch._C._ExcludeDispatchKeyGuard(prepared.AUTOCAST):
            return ready.linear(x, self._sites[number])

    def apart(self, number: int) -> bool:
        return False


def _made(module: nn.Module, site: ReadySite, name: str | None) -> ready.Ready:
    """A site's product, ready. ``name`` is its bias's in the module."""
    weight = operands.autocast(site.weight(module))
    bias = None if name is None else operands.autocast(getattr(module, name))
    input_range = getattr(module, site.state.input_range, None)
    input_range = None if input_range is None else input_range.abs()
    return ready.make(weight, bias, input_range, getattr(module, site.state.clip, None), site.spec)
