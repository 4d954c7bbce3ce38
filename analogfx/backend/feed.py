"""What a compiled graph needs at every call besides its own inputs, and whose call it is.

One graph serves every module whose code and shapes are the same. Whose weights a call brings is
seen when they come for the first time: then the model is looked for that is being called, the
state of its modules is found, and its report is told of the graph's products.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from analogfx.backend import graph as dynamo
from analogfx.backend.state import Names, Place, Slot, state_of
from analogfx.report import CompiledSite, note_compiled


@dataclass(frozen=True)
class Product:
    """One product of a graph, for every model whose code is the same."""

    site: CompiledSite
    """As it was reported for the model that the graph was traced in."""
    position: int | None
    """Which input is the parameter; None where an op's inner graph hides it."""
    place: Place

    def of(self, names: Names, args: Sequence[Any]) -> CompiledSite:
        """The product in the model that a call belongs to."""
        found = None if self.position is None else names.at(args[self.position], self.place)
        if found is None:
            return self.site
        module, parameter = found
        return replace(self.site, module=module, site=replace(self.site.site, name=parameter))


class Feed:
    """The state that a graph's calls need, and the report of the models that call it."""

    def __init__(
        self,
        slots: Iterable[tuple[int, Slot]],
        products: Sequence[Product],
        parameters: Sequence[int],
    ) -> None:
        """A feed for one graph.

        Args:
            slots: which input is a weight, and one use of it; as many times as there are uses.
            parameters: which inputs are parameters.
        """
        self.slots = list(slots)
        self.products = list(products)
        self.parameters = list(parameters)
        self._seen = WeakTensorKeyDictionary()

    def state(self, args: Sequence[Any]) -> list[Tensor]:
        """The state of the weights of one call, in the order of the inputs that take it."""
        names: Names | None = None

        def home(weight: Tensor, slot: Slot) -> Any:
            nonlocal names
            if names is None:
                names = Names(dynamo.compiled_root())
            return names.home(weight, slot.place)

        found: list[Tensor] = []
        for position, slot in self.slots:
            weight = args[position]
            found += state_of(weight, slot, functools.partial(home, weight, slot)).tensors()
        return found

    def report(self, args: Sequence[Any]) -> None:
        """Tell the report of a model that calls the graph for the first time."""
        if not self.parameters or args[self.parameters[0]] in self._seen:
            return
        self.note(dynamo.compiled_root(), args)

    def sites(self) -> list[CompiledSite]:
        """The products, as they are in the model that the graph was traced in."""
        return [product.site for product in self.products]

    def note(self, model: nn.Module | None, args: Sequence[Any]) -> None:
        """Note the products of a graph, and the parameters that it contains."""
        weights = [args[i] for i in self.parameters]
        if weights:
            self._seen[weights[0]] = True
        names = Names(model)
        note_compiled(model, [p.of(names, args) for p in self.products], weights)
