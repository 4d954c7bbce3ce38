"""A module's own forward as an ``fx.Graph``.

Only the module's own code is traced; its children stay calls. The graph's code is bound to a
module by the name ``self``, so modules that look alike share one graph and parameters never leave
their owner.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import linecache
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer

from analogfx.errors import CaptureError
from analogfx.passes.contract import mark_stationary

Pattern = tuple[tuple[str, Any], ...]
"""Arguments of a forward that are not tensors, by name: a graph is traced for their values."""

_CONSTANT = (type(None), bool, int, float, str)

# What a forward must mention to multiply anything by a parameter.
_PRODUCTS = {
    "linear", "bilinear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "tensordot",
    "conv1d", "conv2d", "conv3d", "inner", "mv", "dot", "_grouped_mm", "grouped_mm",
}  # fmt: skip


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The digital forward of a module's class."""
    return getattr(type(module), "digital_forward", type(module).forward)


def mentions_product(module: nn.Module) -> bool:
    """Whether a module's forward, or a method of its own that it calls, could hold a product."""
    forward = forward_of(module)
    pending: list[Any] = [getattr(f, "__code__", None) for f in (forward, inspect.unwrap(forward))]
    seen = set()
    while pending:
        code = pending.pop()
        if not isinstance(code, CodeType) or code in seen:
            continue
        seen.add(code)
        if _PRODUCTS & {*code.co_names} or any(
            i.argrepr == "@" or i.opname == "BINARY_MATRIX_MULTIPLY"
            for i in dis.get_instructions(code)
        ):
            return True
        pending.extend(code.co_consts)
        pending.extend(
            getattr(getattr(type(module), name, None), "__code__", None) for name in code.co_names
        )
    return False


def default_pattern(module: nn.Module) -> Pattern:
    """The constants that a call of the forward with its required arguments alone passes."""
    return tuple(
        (p.name, p.default)
        for p in _parameters(module)
        if p.default is not p.empty and isinstance(p.default, _CONSTANT)
    )


def pattern_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pattern:
    """The constants that one call of the forward passes."""
    given = dict(zip((p.name for p in _parameters(module)), args, strict=False)) | dict(kwargs)
    return tuple(
        (p.name, value)
        for p in _parameters(module)
        if (value := given.get(p.name, p.default)) is not p.empty and isinstance(value, _CONSTANT)
    )


def takes_constants(module: nn.Module) -> bool:
    """Whether a call of the forward may pass anything but the tensors that it requires."""
    return any(p.default is not p.empty for p in _parameters(module))


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(forward_of(module)).parameters.values())[1:]


class _OwnForward(Tracer):
    """Traces one module's code and leaves every child a call."""

    proxy_buffer_attributes = True  # a buffer that forward writes to must not be written here

    def __init__(self, module: nn.Module) -> None:
        super().__init__(param_shapes_constant=True)
        if hasattr(type(module), "digital_forward"):
            self.traced_func_name = "digital_forward"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def capture(module: nn.Module, training: bool, pattern: Pattern) -> Graph:
    """Trace a module's own forward.

    The nodes that bring its parameters and buffers in are marked for the passes. The module is as
    it was afterwards, whatever its forward assigned to it.

    Args:
        training: the mode to trace in.
        pattern: values of the arguments that are constants, see :func:`default_pattern`.

    Raises:
        CaptureError: the forward cannot be traced; the text says why.
    """
    if "forward" in module.__dict__:
        raise CaptureError("forward is overridden on the instance, so its class does not run")
    if not isinstance(forward_of(module), FunctionType):
        raise CaptureError("forward is not a Python function")
    kinds = {p.kind for p in _parameters(module)}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        raise CaptureError("forward takes *args or **kwargs")
    before = dict(module.__dict__)
    module.training = training
    try:
        graph = _OwnForward(module).trace(module, concrete_args=dict(pattern))
    except Exception as error:  # any code may fail in any way on a proxy
        raise CaptureError(f"forward cannot be traced ({_line(error)})") from error
    finally:
        module.__dict__.clear()
        module.__dict__.update(before)
    for node in graph.nodes:
        _mark(module, node)
    return graph


def _line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]


def _mark(module: nn.Module, node: Node) -> None:
    if node.op == "get_attr":
        value: Any = module
        for name in str(node.target).split("."):
            value = getattr(value, name)
    elif node.op == "call_module" and not node.args and not node.kwargs:
        with torch.no_grad():  # a parametrized weight: a module without an input
            value = module.get_submodule(str(node.target))()
    else:
        return
    if isinstance(value, Tensor):
        stand_in = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta"
        )
        is_parameter = isinstance(value, nn.Parameter) or node.op == "call_module"
        mark_stationary(node, stand_in, str(node.target) if is_parameter else None)


_numbers = itertools.count()


def bind(graph: Graph) -> Callable[..., Any]:
    """A graph's code as a function whose first argument is the module."""
    code = graph.python_code("self")
    name = f"<analogfx graph {next(_numbers)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, name, "exec", dont_inherit=True), names)
    return names["forward"]


def source(graph: Graph) -> str:
    """A graph as readable Python."""
    return graph.python_code("self").src
