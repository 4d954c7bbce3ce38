"""What the passes may ask about a graph whose weights are inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from analogfx.backend import graph as dynamo
from analogfx.backend.configs import Configs, configs_of, refuse_learned
from analogfx.backend.options import Options
from analogfx.backend.state import Home, Names, Place, Slot, state_of
from analogfx.choose import Chosen
from analogfx.config import Resolved
from analogfx.modules.children import child_of
from analogfx.passes.contract import Context, Site, is_canonical
from analogfx.passes.stationary import without_cast


@dataclass
class DynamoContext(Context):
    """Answers for a graph of Dynamo's, every module of which has a config and a mode of its own."""

    module: GraphModule = field(default_factory=lambda: GraphModule({}, Graph()))
    configs: Configs | None = None
    weights: dict[str, Node] = field(default_factory=dict)
    """Inputs that are parameters, by path."""
    root: nn.Module | None = None
    names: Names = field(default_factory=lambda: Names(None))
    fake_mode: Any = None
    equal: list[tuple[Node, Node]] = field(default_factory=list)
    """Frozen nodes whose values were taken for equal."""
    owners: dict[Node, dynamo.Owner] = field(default_factory=dict)
    modules: dict[Node, nn.Module] = field(default_factory=dict)
    """The modules that multiply, by the product, which is known by its operands at first alone."""
    slots: dict[tuple[int, Slot], list[Node]] = field(default_factory=dict)
    """(Which input is the weight, use of it) to the inputs that hold its state."""

    @classmethod
    def of(cls, module: GraphModule, options: Options, fake_mode: Any) -> DynamoContext:
        """The context of a graph that Dynamo has just traced."""
        root = dynamo.compiled_root()
        context = cls(None, False, torch.is_grad_enabled(), module=module, root=root)
        context.names = Names(root)
        paths = {key: names[0] for key, names in context.names.of.items()}
        context.weights = dynamo.mark_weights(module.graph, paths)
        context.fake_mode = fake_mode
        if options.rpu_config is not None:
            context.configs = configs_of(options.rpu_config, root)
        return context

    def config_of(self, product: Node) -> Resolved | None:
        """The config of the module that multiplies; a learned range or clip is refused."""
        node = self.parameter(product.args[1])
        self._module(product, node)
        config = self.chosen(product, node).resolved
        if config is not None:
            refuse_learned(config, node.meta["parameter"], self.training_of(product))
        return config

    def packs(self, weight: Node) -> bool:
        """As the config of the module says that holds the weight."""
        assert self.configs is not None
        if self.configs.for_all is None and weight not in self.weights.values():
            return False
        chosen = self.configs.for_all or self.configs.of(self._owner(weight).module)
        return chosen.resolved is not None and chosen.resolved.packed_projections

    def chosen(self, product: Node, node: Node) -> Chosen:
        """What was chosen for the module that multiplies by the parameter of an input."""
        assert self.configs is not None
        return self.configs.for_all or self.configs.of(self._module(product, node))

    def training_of(self, product: Node) -> bool:
        """The mode of the module that owns the weight."""
        return self._owner(self.parameter(product.args[1])).module.training

    def parameter(self, weight: Any) -> Node:
        """The input that a weight is computed from; of several the one that names its state."""
        return self.weights[weight.meta["parameter"]]

    def place(self, product: Node, weight: Node) -> Place:
        """Where the module is that multiplies by the parameter of an input."""
        return self.names.locate(dynamo.example(weight), self._module(product, weight))

    def _module(self, product: Node, node: Node) -> nn.Module:
        """The module that multiplies, its child whose product it is, or the weight's owner."""
        owner = self._owner(node).module  # guarded, whichever module multiplies
        if product not in self.modules:
            module = dynamo.module_of(product, dynamo.example(node))
            child = None if module is None else self._child(module, product)
            self.modules[product] = child or module or owner
        return self.modules[product]

    def _child(self, module: nn.Module, product: Node) -> nn.Module | None:
        """The child of a module that would compute a product of the module's own code."""
        if not is_canonical(product):
            return None
        operands = (
            dynamo.example(a) if isinstance(a, Node) and a.op == "placeholder" else a
            for a in product.args[1:3]
        )
        child = child_of(module, product, *operands)
        return None if child is None else module.get_submodule(child)

    def _owner(self, node: Node) -> dynamo.Owner:
        if node not in self.owners:
            self.owners[node] = owner = dynamo.owner_of(node)
            dynamo.guard_training(owner)
            configs = self.configs
            if configs is not None and configs.for_all is None:
                config = configs.of(owner.module).resolved
                same = functools.partial(configs.same, resolved=config)
                dynamo.guard(node, same, "the weight has the same config")
        return self.owners[node]

    def attribute(self, graph: Graph, site: Site, name: str) -> Any:
        """An input that holds a site's state, made on first use."""
        node = self.parameter(site.weight)
        position = graph.find_nodes(op="placeholder").index(node)
        weight, module = dynamo.example(node), self._module(site.product, node)
        place = self.names.locate(weight, module)
        slot = Slot(derivation(site.weight), site.range_shape, site.config, place)
        if (position, slot) not in self.slots:
            own = place.parts(str(node.meta["parameter"]))[1]
            home = self.names.home(weight, place) or Home(module, own)
            self.slots[position, slot] = [
                self._add_state(graph, f"state_{len(self.slots)}_{number}", tensor)
                for number, tensor in enumerate(state_of(weight, slot, lambda: home).tensors())
            ]
        return self.slots[position, slot][site.state.all().index(name)]

    def path(self, graph: Graph, site: Site) -> str:
        """The parameter's name: one graph serves many modules."""
        return site.decision.name

    def _add_state(self, graph: Graph, name: str, value: Tensor) -> Node:
        node = dynamo.add_input(graph, name, self.fake_mode.from_tensor(value, static_shapes=True))
        node.meta |= {"state": True, "real": value, "stationary": value.to("meta")}
        node.meta["parameter"] = None
        return node

    def same_value(self, first: Node, second: Node) -> bool:
        """Whether two frozen values are equal now, noted as something to check."""
        if first is second:
            return True
        if self.root is None or not torch.equal(self._value(first), self._value(second)):
            return False
        self.equal.append((first, second))
        return True

    def _value(self, node: Node) -> Any:
        """The real value of a frozen node."""
        if node.op == "placeholder":
            return self.real(node)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._value)
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def real(self, node: Node) -> Any:
        """The value that an input had when the graph was traced."""
        return node.meta["real"] if "real" in node.meta else dynamo.example(node)

    def anchor(self) -> Node:
        """An input that a guard can hang on: a weight."""
        return next(iter(self.weights.values()))

    def stand_ins(self) -> list[Any]:
        """Fake tensors for the inputs that hold state."""
        return [n.meta["example_value"] for nodes in self.slots.values() for n in nodes]


def derivation(weight: Node) -> str:
    """How a weight is computed from its parameters, as a text."""
    weight = without_cast(weight)
    if weight.op == "placeholder":
        path = weight.meta.get("parameter")
        return weight.name if path is None else path.rpartition(".")[2]
    name = weight.target if isinstance(weight.target, str) else weight.target.__name__
    return f"{name}{torch.fx.node.map_arg(weight.args, derivation)}"
