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
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node, Tracer
from torch.fx._symbolic_trace import (
    _autowrap_check,
    _constant_attribute_types,
    _new_patcher,
    _patch_wrapped_functions,
)
from torch.fx.proxy import ParameterProxy, Proxy
from torch.utils._python_dispatch import TorchDispatchMode

from analogfx.errors import CaptureError
from analogfx.modules.kinds import FORWARDS
from analogfx.modules.stand_in import StandIn
from analogfx.passes.stationary import mark_stationary

Pattern = tuple[tuple[str, Any], ...]
"""Arguments of a forward that are not tensors, by name: a graph is traced for their values."""

_CONSTANT = (type(None), bool, int, float, str)

# What a forward must mention to multiply anything by a parameter.
_PRODUCTS = {
    "linear", "bilinear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "tensordot",
    "conv1d", "conv2d", "conv3d", "inner", "mv", "dot", "_grouped_mm", "grouped_mm",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "multi_dot", "chain_matmul",
    "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip


def forward_of(module: nn.Module) -> Any:
    """The forward to trace: the digital one of a module's class, or what its kind has for it.

    None where the class has no such attribute.
    """
    cls = type(module)
    own = getattr(cls, "digital_forward", None) or getattr(cls, "forward", None)
    return FORWARDS.get(own, own) if isinstance(own, FunctionType) else own


def mentions_product(module: nn.Module) -> bool:
    """Whether a module's forward, or a function of its own that it calls, could hold a product."""
    if not isinstance(forward_of(module), FunctionType):
        return True  # there is no telling
    return any(
        _PRODUCTS & {*code.co_names}
        or any(
            i.argrepr == "@" or i.opname == "BINARY_MATRIX_MULTIPLY"
            for i in dis.get_instructions(code)
        )
        for code in _own_code(module)
    )


def reads_weights(module: nn.Module) -> bool:
    """Whether a module's code reads an attribute ``weight``, of a child say."""
    return any("weight" in code.co_names for code in _own_code(module))


def _own_code(module: nn.Module) -> Iterator[CodeType]:
    """The code of a module's forward and of what it calls by name, torch's own left out."""
    forward = forward_of(module)
    pending: list[Any] = [forward, inspect.unwrap(forward)]
    seen = set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        for code in _codes(function.__code__):
            yield code
            for name in code.co_names:
                helper = function.__globals__.get(name)
                ours = not getattr(helper, "__module__", "torch").startswith("torch.")
                pending += [getattr(type(module), name, None), helper if ours else None]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


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
    forward = forward_of(module)
    if not isinstance(forward, FunctionType):
        return []
    return list(inspect.signature(forward).parameters.values())[1:]


TRACING = threading.RLock()
"""Held while a forward is traced: torch.fx keeps what it traces in globals of the process."""


class _OwnForward(Tracer):
    """Traces one module's code and leaves every child a call.

    Not by ``Tracer.trace``, which patches ``nn.Module`` for every thread of the process and says
    in a global that tracing is on.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(param_shapes_constant=True)
        self.modes = _modes()
        self.cache: dict[str, Any] = {}
        self.stand_in = StandIn(
            module,
            lambda name, value: self.getattr(name, value, self.cache),
            lambda child, args, kwargs: self.call_module(child, child.forward, args, kwargs),
        )

    def run(self, forward: FunctionType, training: bool, pattern: Pattern) -> Graph:
        """Run a forward on proxies, and take down what it does."""
        self.root = root = self.stand_in.module
        root.training = training
        self.root_module_name = root._get_name()
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.tensor_attrs = {
            value: ".".join(filter(None, (path, name)))
            for path, module in root.named_modules()
            for name, value in module.__dict__.items()
            if isinstance(value, _constant_attribute_types)
        }
        self.graph = Graph(tracer_cls=type(self))
        names = forward.__globals__
        function, args = self.create_args_for_root(forward, True, dict(pattern))
        before = dict(root.__dict__)
        with _NoDraws(), _new_patcher() as patcher:
            _patch_wrapped_functions(patcher)
            for searched in (names, *(m.__dict__ for m in self._autowrap_search)):
                _autowrap_check(patcher, searched, self._autowrap_function_ids)
            self.create_node("output", "output", (self.create_arg(function(*args)),), {})
        _check_pure(before, root.__dict__)
        if changed := self.stand_in.changed():
            raise CaptureError(f"forward changes what self.{changed} holds")
        return self.graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not isinstance(attr_val, Tensor) or isinstance(attr_val, nn.Parameter):
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        # A buffer, which forward may write to: that must not happen here.
        for name, buffer in self.root.named_buffers():
            if buffer is attr_val:
                if name not in parameter_proxy_cache:
                    node = self.create_node("get_attr", name, (), {})
                    parameter_proxy_cache[name] = _BufferProxy(self, node, name, buffer)
                return parameter_proxy_cache[name]
        return attr_val

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _modes() != self.modes:
            raise RuntimeError("it switches gradients or autocast on or off")
        node = super().create_node(*args, **kwargs)
        if node.op != "output":
            node.meta["where"] = _statement()
        return node


_INNER = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")


def _statement() -> str:
    """File and line that runs, the innermost outside torch and this package."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_INNER):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class _NoDraws(TorchDispatchMode):
    """Refuses random numbers before they are drawn, so that no generator advances."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError("forward draws random numbers that are no function of its input")
        return func(*args, **(kwargs or {}))


class _BufferProxy(ParameterProxy):
    """A buffer in a trace: its shape is known, its values are not."""

    def __init__(self, tracer: Tracer, node: Node, name: str, buffer: Tensor) -> None:
        Proxy.__init__(self, node, tracer)
        self.param, self.name = buffer, name  # type: ignore[assignment]


def _modes() -> tuple[bool, bool, int]:
    """What context managers change and a graph does not record."""
    torch.autocast_increment_nesting()
    nesting = torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), nesting


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
    if not isinstance(forward_of(module), FunctionType):
        raise CaptureError("forward is not a Python function")
    if "forward" in module.__dict__:
        raise CaptureError("forward is overridden on the instance, so its class does not run")
    kinds = {p.kind for p in _parameters(module)}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        raise CaptureError("forward takes *args or **kwargs")
    with TRACING:
        try:
            with torch.enable_grad():
                graph = _OwnForward(module).run(forward_of(module), training, pattern)
        except CaptureError:
            raise
        except Exception as error:  # any code may fail in any way on a proxy
            raise CaptureError(f"forward cannot be traced ({_line(error)})") from error
        _restore_names(graph, [p.name for p in _parameters(module)])
        for node in graph.nodes:
            _mark(module, node)
    return graph


def _check_pure(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Refuse a forward that assigned to attributes, which its graph does not do.

    Args:
        before, after: the module's attributes.
    """
    nothing = object()
    written = [k for k, v in after.items() if v is not before.get(k, nothing)]
    if any(name.startswith("_tensor_constant") for name in written):
        raise CaptureError("forward makes a tensor that is no function of its input")
    if written:
        raise CaptureError(f"forward assigns to self.{written[0]}")


def _restore_names(graph: Graph, names: list[str]) -> None:
    """Give the arguments of a graph their names, and drop the tracer's checks of constants."""
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        if node.target != name:  # the tracer renames constants
            node.target = name
            for check in reversed(_all_users(node)):
                graph.erase_node(check)


def _all_users(node: Node) -> list[Node]:
    """Every node that a node's value goes into, in order."""
    users = dict.fromkeys(node.users)
    for user in node.users:
        users.update(dict.fromkeys(_all_users(user)))
    return sorted(users)


def _line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]


def _mark(module: nn.Module, node: Node) -> None:
    if node.op == "get_attr":
        value: Any = module
        for name in str(node.target).split("."):
            value = getattr(value, name)
    elif node.op == "call_module" and not node.args and not node.kwargs:
        # A parametrized weight: a module without an input, which may change its own buffers.
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
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
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, name, "exec", dont_inherit=True), names)
    forward: Callable[..., Any] = names.pop("forward")
    # For tracebacks, as long as there is something to trace back to.
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    weakref.finalize(forward, linecache.cache.pop, name, None).atexit = False
    return forward


def source(graph: Graph) -> str:
    """A graph as readable Python."""
    return graph.python_code("self").src
