"""A forward that no trace follows, run as it is, with its products done where they belong.

Such a forward runs under a mode that sees every call of a torch function. A call that multiplies by
a weight, told by its storage, is a product: the child's whose weight it is, or one of the module's
own. A product of a child's weight is what the child computes, so the child is called; it has the
site. The module's own products are known beforehand from a trace that went as far as it could: they
are driven, as those of a recurrent layer are.

A product that was not foreseen runs as it is written, and is noted: the report shows it.
"""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from analogfx.config import Resolved
from analogfx.errors import CaptureError
from analogfx.modules.capture import TRACING, Pattern, bind, multiplied, opaque, scout
from analogfx.modules.children import plain_child, variant_of
from analogfx.modules.inherited import inherited_layer
from analogfx.modules.kinds.recurrent import Driver
from analogfx.modules.program import Program, build, program_of
from analogfx.passes import expand, normalize, pipeline, respell
from analogfx.passes.contract import Context, Decision, decisions_of, is_canonical
from analogfx.passes.harmless import PRODUCTS
from analogfx.passes.pipeline import Pass
from analogfx.passes.stationary import (
    mark_stationary,
    propagate_stationary,
    sources,
    weight_value,
    without_cast,
)

_ACTIVATION = "an activation"


class _Weight(NamedTuple):
    """A parameter of the module, or a view of one, as an operand."""

    path: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def build_or_run(
    module: nn.Module,
    config: Resolved | None,
    training: bool,
    pattern: Pattern,
    debug_dir: Path | None = None,
    passes: Sequence[Pass] = (),
) -> Program:
    """The program of a module, see ``build``; of its own forward where that cannot be traced.

    Raises:
        CaptureError: it cannot be traced, and there is no product in it that can be told.
        PassError: one of ``passes`` failed.
    """
    with TRACING:
        try:
            return build(module, config, training, pattern, debug_dir, passes)
        except CaptureError as error:
            found = _program(module, config, training, str(error), passes)
            if found is None:
                raise
            return found


def _program(
    module: nn.Module, config: Resolved | None, training: bool, why: str, passes: Sequence[Pass]
) -> Program | None:
    if "forward" in module.__dict__ or inherited_layer(module) is not None:
        return None
    names = multiplied(module)
    hidden = opaque(module)
    of_children = [n for n in names if n not in hidden and plain_child(module, n)]
    own = _own_products(module, training, {*names} - {*of_children, *hidden})
    if not (of_children or own):
        return None
    forward = _Forward(module, [*own], names)
    graph = _tuple_of(own.values())
    made = program_of(
        module, config, training, graph, passes=passes, driver=Driver(forward.run, lambda _: [])
    )
    # An addend of a product is no product of its own.
    listed = {w.path for key in own for w in _weights_of(key)} | {*of_children}
    left = tuple(
        Decision(name, type(module).__name__, tuple(p.shape), (0, 0), "digital", why, "capture")
        for name, p in module.named_parameters()
        if name in names and name not in listed
    )
    readers = dict.fromkeys((*made.readers, *(n.rpartition(".")[0] for n in of_children)))
    return replace(
        made,
        decisions=made.decisions + left,
        readers=tuple(readers),
        delegates=bool(of_children),
        own_forward=True,
    )


# ------------------------------------------------------------------------- calls, and what they are


def _form(value: Any, slot: Callable[[Any], Any]) -> Any:
    """An argument as part of a key: a tensor as its slot, a constant as itself."""
    if isinstance(value, (Tensor, Node)):
        return slot(value)
    if isinstance(value, (tuple, list)):
        return ("sequence", *(_form(v, slot) for v in value))
    if isinstance(value, dict):
        return ("mapping", *((k, _form(v, slot)) for k, v in sorted(value.items())))
    return type(value).__name__, value


def _weights_of(form: Any) -> Iterator[_Weight]:
    """The weights among the arguments of a call."""
    if isinstance(form, _Weight):
        yield form
    elif isinstance(form, tuple):
        for part in form:
            yield from _weights_of(part)


@functools.cache
def _product(function: Any) -> tuple[str, Any] | None:
    """What a graph has for a function that may multiply: the node's op and target, else None."""
    name = getattr(function, "__name__", "")
    if name.strip("_") not in PRODUCTS and function not in expand.RULES:
        return None
    if getattr(Tensor, name, None) is not function:
        return "call_function", function
    return ("call_function", operator.matmul) if name == "__matmul__" else ("call_method", name)


# --------------------------------------------------------------------- the module's own products


def _own_products(module: nn.Module, training: bool, names: set[str]) -> dict[Any, Node]:
    """The calls in a module's forward that multiply an activation by a matrix of its own.

    Args:
        names: of the matrices.

    Returns:
        A node that stands for each, by its key; the rest of its graph may be incomplete.
    """
    found: dict[Any, Node] = {}
    for graph in scout(module, training) if names else ():
        propagate_stationary(graph)
        for node in graph.nodes:
            known = node.op in ("call_function", "call_method")
            if known and _product(_function_of(node)) is not None and _is_own(node, names):
                slot = functools.partial(_slot_of_node, module)
                form = _form((node.args, node.kwargs), slot)
                found.setdefault((node.op, node.target, form), node)
    return found


def _function_of(node: Node) -> Any:
    """What a node calls, as a mode sees it."""
    if node.op == "call_method":
        return getattr(Tensor, str(node.target), None)
    return Tensor.__matmul__ if node.target is operator.matmul else node.target


def _is_own(node: Node, names: set[str]) -> bool:
    """Whether one operand is an activation, and all others are parameters as they are."""
    if "stationary" in node.meta:
        return False
    operands = node.all_input_nodes
    weights = [n for n in operands if weight_value(n) is not None]
    places = [_parameter_of(n) for n in weights]
    matrices = {p for n, p in zip(weights, places, strict=True) if n.meta["stationary"].dim() > 1}
    return len(operands) == len(weights) + 1 and None not in places and bool(matrices & names)


def _parameter_of(node: Node) -> str | None:
    """The path of the parameter that a weight is a view of; None for one that is computed."""
    storage = _storage(without_cast(node).meta["stationary"])
    reads = (n for n in sources(node) if n.op == "get_attr")
    return next((str(n.target) for n in reads if _storage(n.meta["stationary"]) == storage), None)


def _slot_of_node(module: nn.Module, node: Node) -> Any:
    path = _parameter_of(node) if weight_value(node) is not None else None
    if path is None:
        return _ACTIVATION
    parameter = operator.attrgetter(path)(module)
    first = next(n for n, p in module.named_parameters() if p is parameter)  # of tied ones
    return _weight(first, without_cast(node).meta["stationary"])


def _weight(path: str, value: Tensor) -> _Weight:
    return _Weight(path, tuple(value.shape), value.stride(), int(value.storage_offset()))


def _tuple_of(products: Iterable[Node]) -> Graph:
    """A graph of products, each of its own item of the one input, as :mod:`driven` cuts it."""
    graph = Graph()
    inputs = graph.placeholder("inputs")
    made = []
    for number, product in enumerate(products):
        copies: dict[Node, Node] = {}

        def copy(node: Node, number: int = number, copies: dict[Node, Node] = copies) -> Node:
            if node not in copies:
                own = "stationary" in node.meta
                copies[node] = (
                    graph.node_copy(without_cast(node), copy)
                    if own
                    else graph.call_function(operator.getitem, (inputs, number))
                )
            return copies[node]

        made.append(graph.node_copy(product, copy))
    graph.output(tuple(made))
    return graph


# ---------------------------------------------------------------------- a call of the own forward


class _Forward:
    """The own forward of modules that look alike."""

    def __init__(self, module: nn.Module, own: list[Any], names: list[str]) -> None:
        """``own``: keys of the module's own products; ``names``: of all that it multiplies by."""
        owners = {"", *(name.rpartition(".")[0] for name in names)}
        self.read = [
            name
            for name, p in module.named_parameters()
            if name in names or (p.dim() < 2 and name.rpartition(".")[0] in owners)
        ]
        """Paths of the parameters that may be operands: these matrices, and biases beside them."""
        self.buffers = [
            name for name, _ in module.named_buffers() if name.rpartition(".")[0] in owners
        ]
        self.known: dict[Any, Callable[..., Any] | int | None] = dict(zip(own, itertools.count()))
        """What computes a call: the number of a product, a function of the module and the call's
        activations, or None for the call itself."""

    def run(
        self, module: nn.Module, products: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run it, with its products done where they belong."""
        with _InPlaceOfProducts(self, module, products):
            return type(module).digital_forward(module, *args, **kwargs)  # type: ignore[attr-defined]


class _InPlaceOfProducts(TorchFunctionMode):
    """Answers products by a module's weights."""

    def __init__(self, forward: _Forward, module: nn.Module, products: Any) -> None:
        super().__init__()
        self.forward, self.module, self.products = forward, module, products
        self.paths: dict[int, str] = {}
        """Of parameters, by their storage."""
        for name in forward.read:
            self.paths.setdefault(_storage(operator.attrgetter(name)(module)) or 0, name)
        buffers = (operator.attrgetter(name)(module) for name in forward.buffers)
        self.constants = {_storage(buffer) for buffer in buffers}
        self.computed: dict[int, tuple[str, Tensor]] = {}
        """Values that matrices were made into: the parameter's path, and the value, kept alive."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        call = _product(func)
        if call is None:
            out = func(*args, **kwargs)
            self._follow((args, kwargs), out)
            return out
        key = (*call, _form((args, kwargs), self._slot))
        weights = [w.path for w in _weights_of(key) if len(w.shape) > 1]
        activations = [*_tensors((args, kwargs), self._slot)]
        made = [self.computed.get(_storage(t) or 0) for t in activations]
        computed = [entry[0] for entry in made if entry is not None]
        if computed and len(computed) < len(activations):
            self._note(computed, "it multiplies by what it computes of the weight")
        if not weights or not activations:
            return func(*args, **kwargs)
        known = self.forward.known
        if key not in known:
            known[key] = _by_children(self.module, call, args, kwargs, self._slot)
        found = known[key]
        if isinstance(found, int):
            return self.products(found, activations[0])
        if found is not None:
            return found(self.module, *activations)
        self._note(weights, f"no layer inside computes this {getattr(func, '__name__', 'product')}")
        return func(*args, **kwargs)

    def _slot(self, tensor: Tensor) -> Any:
        """What a tensor is in a call: a weight, or an activation."""
        path = self.paths.get(_storage(tensor) or 0)
        return _ACTIVATION if path is None else _weight(path, tensor)

    def _follow(self, given: Any, out: Any) -> None:
        """Remember what a matrix was made into, by a cast say."""
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return
        path = ""
        for tensor in _tensors(given, _anything):
            storage = _storage(tensor) or 0
            if storage in self.paths:
                path = self.paths[storage] if tensor.dim() > 1 else path
            elif storage in self.computed:
                path = self.computed[storage][0]
            elif storage not in self.constants:
                return  # an activation
        made = _storage(out) or 0
        if path and made not in self.paths:
            self.computed[made] = path, out

    def _note(self, paths: list[str], why: str) -> None:
        placement: Any = self.module._analog
        for path in paths:
            if path not in placement.unforeseen:
                placement.unforeseen[path] = why
                warnings.warn(
                    f"{placement.name or type(self.module).__name__}: digital by {path}: {why}. "
                    'torch.compile(model, backend="analogfx") follows what a trace cannot',
                    stacklevel=4,
                )


def _storage(tensor: Tensor) -> int | None:
    """What tells whether two tensors share their memory; None where that cannot be told."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or one inside torch.func
        return None


# ----------------------------------------------------------------------- products of the children


def _by_children(
    module: nn.Module,
    call: tuple[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    slot: Callable[[Tensor], Any],
) -> Callable[..., Any] | None:
    """A function that computes a call by calling the children whose weights it multiplies by.

    None where one of its products is not what a child computes.
    """
    graph = Graph()

    def operand(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(operand(v) for v in value)
        if isinstance(value, dict):
            return {k: operand(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        found = slot(value)
        if not isinstance(found, _Weight):
            return next(inputs)
        return _read(graph, module, found)

    count = sum(1 for _ in _tensors((args, kwargs), slot))
    inputs = iter([graph.placeholder(f"x{i}") for i in range(count)])
    try:
        made = graph.create_node(call[0], call[1], operand(args), operand(kwargs))
    except _Elsewhere:
        return None
    graph.output(made)
    try:
        pipeline.run(_SPELLING, graph, Context(None, module.training))
    except (KeyError, AttributeError, TypeError):  # a call that a rule cannot do without its module
        return None
    if any(decisions_of(node) for node in graph.nodes):
        return None
    for node in [n for n in graph.nodes if is_canonical(n)]:
        if not _delegate(graph, module, node):
            return None
    left = [n for n in graph.nodes if weight_value(n) is not None and n.op == "get_attr"]
    used = [n for n in left if n.users and n.meta["stationary"].dim() > 1]
    return None if used else bind(graph)


_SPELLING = (expand.expand, respell.respell, normalize.normalize)


def _anything(tensor: Tensor) -> Any:
    """A slot that makes every tensor count."""
    return _ACTIVATION


class _Elsewhere(Exception):
    """An operand is no parameter as it is, nor transposed."""


def _tensors(value: Any, slot: Callable[[Tensor], Any]) -> Iterator[Tensor]:
    """The activations among the arguments of a call."""
    if isinstance(value, Tensor):
        if not isinstance(slot(value), _Weight):
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part, slot)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part, slot)


def _read(graph: Graph, module: nn.Module, weight: _Weight) -> Node:
    """A node for a parameter as it is, or transposed."""
    parameter = operator.attrgetter(weight.path)(module)
    node = graph.get_attr(weight.path)
    value = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"
    )
    mark_stationary(node, value, weight.path)
    if _weight(weight.path, parameter) == weight:
        return node
    if parameter.dim() == 2 and _weight(weight.path, parameter.mT) == weight:
        return graph.call_method("t", (node,))
    raise _Elsewhere


def _delegate(graph: Graph, module: nn.Module, node: Node) -> bool:
    """Put the call of a child in the place of a canonical product."""
    x, weight, bias = node.args[:3]
    path = plain_child(module, str(weight.target)) if weight.op == "get_attr" else None  # type: ignore
    if path is None:
        return False
    child: Any = module.get_submodule(path)
    own = isinstance(bias, Node) and bias.op == "get_attr"
    added = operator.attrgetter(str(bias.target))(module) if own else None  # type: ignore
    changed = variant_of(child, node, added)
    if changed is None or (bias is not None and not own and node.target is not F.linear):
        return False
    with graph.inserting_before(node):
        owner = graph.get_attr(path)
        new = graph.call_function(product_of, (owner, x, tuple(changed.items())))
        if bias is not None and not own:
            new = graph.call_function(operator.add, (new, bias))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def product_of(child: Any, x: Tensor, changed: tuple[tuple[str, Any], ...]) -> Any:
    """Call a layer, or what it were with other attributes: without its bias, say.

    The layer's site does both: the same weight, range, noise and chip.
    """
    if not changed:
        return child(x)
    cls: Any = type(child)
    twin = cls.__new__(cls)
    attributes = dict(changed)
    twin.__dict__.update(child.__dict__, _parameters=dict(child._parameters))
    if "bias" in attributes:
        twin._parameters["bias"] = attributes.pop("bias")
    twin.__dict__.update(attributes)
    if "_analog" in twin.__dict__:
        twin.__dict__["_analog"] = child._analog.variant(child, twin, changed)
    return twin(x)
