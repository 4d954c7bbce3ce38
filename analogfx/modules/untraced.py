"""A forward that no trace follows, with its products by children's weights done by the children.

A layer may multiply by the weight of a child that it never calls, in a helper function say. Such a
forward runs as it is, under a mode that sees every call of a torch function. A call that
multiplies by the weight of a child is what the child computes, so the child is called: it has the
site. The call is a graph of its own, which goes through the passes that a traced forward goes
through, so every spelling counts.

A product by such a weight that is not what the child computes runs as it is written. It is noted,
with a warning: the report shows it.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from analogfx.config import Resolved
from analogfx.errors import CaptureError
from analogfx.modules.capture import Pattern, bind, multiplied
from analogfx.modules.children import plain_child, variant_of
from analogfx.modules.inherited import inherited_layer
from analogfx.modules.program import Program, build, check_same_sites
from analogfx.passes import expand, normalize, pipeline, respell
from analogfx.passes.contract import Context, Decision, decisions_of, is_canonical
from analogfx.passes.harmless import PRODUCTS
from analogfx.passes.pipeline import Pass
from analogfx.passes.stationary import mark_stationary, weight_value


class OwnForward:
    """The own forward of modules that look alike, and the children's products that are in it."""

    def __init__(self, paths: Sequence[str], others: Sequence[str]) -> None:
        """Of modules with these children and matrices.

        Args:
            paths: of the children whose weights it multiplies by, from the module.
            others: matrices that it may multiply by itself.
        """
        self.paths, self.others = paths, others
        self._known: dict[Any, Callable[..., Any] | None] = {}
        """What computes a call in its place, as a function of the module and the activations."""

    @_disable_dynamo
    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of a module."""
        forward = getattr(type(module), "digital_forward", type(module).forward)
        with _ByChildren(self, module):
            return forward(module, *args, **kwargs)

    def computed_by(
        self, module: nn.Module, call: Any, key: Any, args: Any, operands: Mapping[int, _Operand]
    ) -> Callable[..., Any] | None:
        """What computes a call by calling children; None where no child computes it."""
        if key not in self._known:
            self._known[key] = _in_place_of(module, call, args, operands)
        return self._known[key]


def build_or_run(
    module: nn.Module,
    config: Resolved | None,
    training: bool,
    pattern: Pattern,
    debug_dir: Path | None = None,
    passes: Sequence[Pass] = (),
) -> Program:
    """The program of a module, see ``build``; its own forward where that cannot be traced.

    Raises:
        CaptureError: it cannot be traced, and multiplies by no child's weight.
        PassError: one of ``passes`` failed.
    """
    try:
        return build(module, config, training, pattern, debug_dir, passes)
    except CaptureError as error:
        own = own_forward(module)
        if own is None:
            raise
        left = _digital_rows(module, own, str(error))
        return Program(own, own, left, (), (), ("", *own.paths), delegates=True)


def of_both_modes(train: Program, evaluate: Program) -> tuple[Program, Program]:
    """The programs of a module, so that its own forward runs in both modes or in none.

    Raises:
        CaptureError: they have other sites.
    """
    check_same_sites(train, evaluate)
    own = next((p for p in (train, evaluate) if isinstance(p.fused, OwnForward)), None)
    return (train, evaluate) if own is None else (own, own)


def own_forward(module: nn.Module) -> OwnForward | None:
    """What runs a module's own forward with its products done by the children whose weights it has.

    None where its source shows no product by a child's weight as it is.
    """
    if "forward" in module.__dict__ or inherited_layer(module) is not None:
        return None
    read = multiplied(module)
    of = {name: plain_child(module, name) for name, as_it_is in read.items() if as_it_is}
    paths = [path for path in of.values() if path is not None]
    return OwnForward(paths, [name for name in read if of.get(name) is None]) if paths else None


def _digital_rows(module: nn.Module, own: OwnForward, why: str) -> tuple[Decision, ...]:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    return tuple(
        Decision(name, type(module).__name__, shapes[name], (0, 0), "digital", why, "capture")
        for name in own.others
    )


# ------------------------------------------------------------------------------ a call, as it runs


class _Operand(NamedTuple):
    """A parameter of a child, or what was made of it, as an operand of a call."""

    path: str
    value: Tensor
    """Kept alive, so that nothing else gets its identity."""
    computed: bool
    """Whether it is no view of the parameter."""

    def form(self) -> tuple[Any, ...]:
        """What tells it from other operands."""
        return (self.path, tuple(self.value.shape), _strides(self.value), self.value.dtype)


class _ByChildren(TorchFunctionMode):
    """Answers products by the weights of children."""

    def __init__(self, own: OwnForward, module: nn.Module) -> None:
        super().__init__()
        self._own, self._module = own, module
        self._operands: dict[int, _Operand] = {}
        """By identity, every value that consists of children's parameters alone."""
        for path in own.paths:
            child = module.get_submodule(path)
            for name, p in child._parameters.items() if "_analog" in child.__dict__ else ():
                if p is not None:
                    self._operands.setdefault(id(p), _Operand(f"{path}.{name}", p, False))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        mine = [self._operands[id(t)] for t in tensors if id(t) in self._operands]
        matrices = [operand for operand in mine if operand.value.dim() > 1]
        if not matrices or _in_a_child():
            return func(*args, **kwargs)
        call = _product(func)
        if len(mine) == len(tensors):
            out = func(*args, **kwargs)
            self._follow(matrices[0], out)
            return out
        if call is None:
            return func(*args, **kwargs)
        key = (*call, _form((args, kwargs), self._operands))
        found = None
        if not any(operand.computed for operand in mine):
            found = self._own.computed_by(self._module, call, key, (args, kwargs), self._operands)
        if found is None:
            self._note(matrices, getattr(func, "__name__", "product"))
            return func(*args, **kwargs)
        return found(self._module, *(t for t in tensors if id(t) not in self._operands))

    def _follow(self, operand: _Operand, out: Any) -> None:
        """Remember what was made of a parameter."""
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.is_floating_point():
                computed = operand.computed or not _same_storage(value, operand.value)
                made = _Operand(operand.path, value, computed)
                self._operands.setdefault(id(value), made)

    def _note(self, operands: Iterable[_Operand], name: str) -> None:
        placement: Any = self._module._analog
        for path in dict.fromkeys(operand.path for operand in operands):
            if path not in placement.unforeseen:
                why = f"its layer does not compute this {name.strip('_')}"
                placement.unforeseen[path] = why
                warnings.warn(
                    f"{placement.name or type(self._module).__name__}: digital by {path}: {why}. "
                    'torch.compile(model, backend="analogfx") follows what a trace cannot',
                    stacklevel=4,
                )


def _in_a_child() -> bool:
    """Whether the call is one of a module inside, which has a placement of its own."""
    frame = sys._getframe(2)
    while frame.f_code is not _RUN:
        if frame.f_globals.get("__name__") == "analogfx.modules.placement":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_RUN = inspect.unwrap(OwnForward.__call__).__code__


def _same_storage(first: Tensor, second: Tensor) -> bool:
    try:
        return first.untyped_storage()._cdata == second.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or one inside torch.func
        return False


def _strides(value: Tensor) -> tuple[int, ...]:
    """The strides of a tensor, without those that say nothing."""
    return tuple(step for size, step in zip(value.shape, value.stride(), strict=True) if size != 1)


def _form(value: Any, operands: Mapping[int, _Operand]) -> Any:
    """An argument as part of a key: a parameter as itself, a constant by its value."""
    if isinstance(value, Tensor):
        return operands[id(value)].form() if id(value) in operands else "an activation"
    if isinstance(value, (tuple, list)):
        return ("sequence", *(_form(v, operands) for v in value))
    if isinstance(value, dict):
        return ("mapping", *((k, _form(v, operands)) for k, v in sorted(value.items())))
    return type(value).__name__, value


@functools.cache
def _product(function: Any) -> tuple[str, Any] | None:
    """What a graph has for a function that may multiply: the node's op and target, else None."""
    name = getattr(function, "__name__", "")
    if name.strip("_") not in PRODUCTS and function not in expand.RULES:
        return None
    if getattr(Tensor, name, None) is not function:
        return "call_function", function
    return ("call_function", operator.matmul) if name == "__matmul__" else ("call_method", name)


# ------------------------------------------------------------------------ a call, by the children


class _Elsewhere(Exception):
    """An operand is no parameter as it is, nor transposed."""


_SPELLING = (expand.expand, respell.respell, normalize.normalize)


def _in_place_of(
    module: nn.Module, call: tuple[str, Any], given: Any, operands: Mapping[int, _Operand]
) -> Callable[..., Any] | None:
    """A function of a module and activations that computes a call by calling children.

    Args:
        given: the arguments, positional and by name.
    """
    graph = Graph()
    leaves = [t for t in tree_leaves(given) if isinstance(t, Tensor) and id(t) not in operands]
    inputs = iter([graph.placeholder(f"x{i}") for i in range(len(leaves))])

    def operand(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(operand(v) for v in value)
        if isinstance(value, dict):
            return {k: operand(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        return _read(graph, module, operands[id(value)]) if id(value) in operands else next(inputs)

    try:
        made = graph.create_node(call[0], call[1], *map(operand, given))
        graph.output(made)
        pipeline.run(_SPELLING, graph, Context(None, module.training))
    except (_Elsewhere, KeyError, AttributeError, TypeError):  # what a rule cannot do by itself
        return None
    if any(decisions_of(node) for node in graph.nodes):
        return None
    if not all(_delegate(graph, module, n) for n in list(graph.nodes) if is_canonical(n)):
        return None
    left = [n for n in graph.nodes if weight_value(n) is not None and n.op == "get_attr"]
    return None if any(n.users and n.meta["stationary"].dim() > 1 for n in left) else bind(graph)


def _read(graph: Graph, module: nn.Module, operand: _Operand) -> Node:
    """A node for a parameter as it is, or transposed."""
    parameter = operator.attrgetter(operand.path)(module)
    node = graph.get_attr(operand.path)
    value = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"
    )
    mark_stationary(node, value, operand.path)
    if _is_view_of(operand, parameter):
        return node
    if parameter.dim() == 2 and _is_view_of(operand, parameter.t()):
        return graph.call_method("t", (node,))
    raise _Elsewhere


def _is_view_of(operand: _Operand, value: Tensor) -> bool:
    """Whether an operand has a value's elements in their order; both share their memory."""
    begins = operand.value.storage_offset() == value.storage_offset()
    return begins and operand.form() == operand._replace(value=value).form()


def _delegate(graph: Graph, module: nn.Module, node: Node) -> bool:
    """Put the call of a child in the place of a canonical product, if it computes that."""
    x, weight, bias = node.args[:3]
    path = plain_child(module, str(weight.target)) if weight.op == "get_attr" else None  # type: ignore
    if path is None:
        return False
    child: Any = module.get_submodule(path)
    own = isinstance(bias, Node) and bias.op == "get_attr"
    added = operator.attrgetter(str(bias.target))(module) if own else None  # type: ignore
    changed = variant_of(child, node, added)
    if changed is None or (bias is not None and not own):
        return False
    with graph.inserting_before(node):
        owner = graph.get_attr(path)
        new = graph.call_function(called_as, (owner, x, tuple(changed.items())))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def called_as(child: Any, x: Tensor, changed: tuple[tuple[str, Any], ...]) -> Any:
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
