"""Values that depend on weights alone, kept from call to call until a weight changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from analogfx.backend.graph import add_input
from analogfx.kernels import changes
from analogfx.kernels.changes import Stamp


@dataclass(frozen=True)
class _Kept:
    """Values, and the weights that they were computed from as those were then."""

    sources: tuple[weakref.ref[Tensor], ...]
    stamps: tuple[Stamp, ...]
    values: tuple[Tensor, ...]

    def fits(self, weights: Sequence[Tensor]) -> bool:
        return all(
            source() is weight and changes.unchanged(weight, stamp)
            for source, stamp, weight in zip(self.sources, self.stamps, weights, strict=True)
        )


class Folded:
    """What ``freeze`` marked, taken out of a graph into one of its own.

    The graph gets an input for every value that it uses of it. :meth:`values` computes them when
    weights are seen for the first time or have changed: by an optimizer, by ``load_state_dict``,
    by any write that torch counts or that ``analogfx.kernels.changes`` is told of.
    """

    def __init__(
        self,
        module: GraphModule,
        equal: Sequence[tuple[Node, Node]],
        anchor: Node | None,
        real: Callable[[Node], Any],
        fake_mode: Any,
    ) -> None:
        """Take the frozen nodes out of a graph.

        Args:
            equal: pairs of frozen nodes whose values were taken for equal.
            anchor: the input that stands for all weights of a call, see :meth:`fits`.
            real: the value that an input had when the graph was traced.
            fake_mode: where stand-ins for the graph's new inputs are made.
        """
        graph = module.graph
        frozen = [n for n in graph.nodes if n.meta.get("frozen")]
        results = [n for n in frozen if any(not u.meta.get("frozen") for u in n.users)]
        compared = [n for pair in equal for n in pair]
        inputs = graph.find_nodes(op="placeholder")
        wanted = {n for node in frozen for n in node.all_input_nodes} | {*compared}
        read = [n for n in inputs if n in wanted]
        self.positions = [inputs.index(n) for n in read]
        """Which of the graph's inputs the values depend on."""
        self._anchor = 0 if anchor is None else inputs.index(anchor)

        body = Graph()
        copies: dict[Node, Node] = {n: body.placeholder(n.name) for n in read}
        for node in frozen:
            copies[node] = body.node_copy(node, copies.__getitem__)
            copies[node].meta.clear()  # it holds the model
        body.output(tuple(copies[n] for n in (*results, *compared)))
        self._compute = GraphModule(module, body)
        self._results = len(results)
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._unfit = WeakTensorKeyDictionary()  # weights for which the graph is wrong

        values, _ = self._computed([real(n) for n in read])
        for node, value in zip(results, values, strict=True):
            stand_in = fake_mode.from_tensor(value, static_shapes=True)
            new = add_input(graph, f"frozen_{node.name}", stand_in)
            node.replace_all_uses_with(new, delete_user_cb=lambda u: not u.meta.get("frozen"))
        for node in reversed(frozen):
            graph.erase_node(node)
        module.recompile()

    def fits(self, anchor: Tensor) -> bool:
        """Whether the graph may run for the weights that come with one of them."""
        return anchor not in self._unfit

    def values(self, args: Sequence[Any]) -> tuple[Tensor, ...] | None:
        """The values for the inputs of one call; None if the graph is not for them."""
        weights = [args[i] for i in self.positions]
        if not weights:
            return self._computed([])[0]
        entries: list[_Kept] = self._kept.setdefault(weights[0], [])
        for kept in entries:
            if kept.fits(weights):
                return kept.values
        values, equal = self._computed(weights)
        if not equal:
            self._unfit[args[self._anchor]] = True
            return None
        alive = [k for k in entries if all(s() is not None for s in k.sources)]
        same = tuple(weakref.ref(w) for w in weights)
        entries[:] = [k for k in alive if k.sources != same]
        entries.append(_Kept(same, tuple(map(changes.stamp, weights)), values))
        return values

    def _computed(self, weights: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
        """The values, and whether what was taken for equal is so."""
        with torch.no_grad():
            # `.data`: a view would keep its weight alive.
            results = [value.data for value in self._compute(*weights)]
        values, compared = results[: self._results], results[self._results :]
        equal = map(torch.equal, compared[::2], compared[1::2])
        return tuple(values), all(equal)
