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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, FunctionType
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
from analogfx.modules import reads
from analogfx.modules.kinds import FORWARDS, traced
from analogfx.modules.stand_in import StandIn
from analogfx.passes.stationary import mark_stationary

Pattern = tuple[tuple[str, Any], ...]
"""Arguments of a forward that are not tensors, by name: a graph is traced for their values."""

_CONSTANT = (type(None), bool, int, float, str)


def forward_of(module: nn.Module) -> Any:
    """The forward to trace: the digital one of a module's class, or what its kind has for it.

    None where the class has no such attribute.
    """
    cls = type(module)
    own = getattr(cls, "digital_forward", None) or getattr(cls, "forward", None)
    return traced(own) if isinstance(own, FunctionType) else own


def may_multiply(module: nn.Module) -> bool:
    """Whether a module's forward, or a function of its own that it calls, could hold a product."""
    if any(base.__dict__.get("forward") in FORWARDS for base in type(module).__mro__):
        return True  # which it may call by super()
    return reads.mentions_product(module, forward_of(module))


def reads_weights(module: nn.Module) -> bool:
    """Whether a module's code reads what a matrix of it, or of a module inside it, is called."""
    return reads.mentions_weight(module, forward_of(module))


def multiplied(module: nn.Module) -> dict[str, bool]:
    """Matrices that a module's code may multiply by, read off its source, by path from it.

    See :func:`.reads.multiplied`.
    """
    return reads.multiplied(module, forward_of(module), dict(default_pattern(module)))


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


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """The arguments of a forward that have names."""
    return [p for p in _signature(module) if p.kind not in _VARIADIC]


def _signature(module: nn.Module) -> list[inspect.Parameter]:
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
            FORWARDS,
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
    forward = _without_variadic(forward_of(module), _signature(module))
    with TRACING:
        try:
            with torch.enable_grad():
                graph = _OwnForward(module).run(forward, training, pattern)
        except CaptureError:
            raise
        except Exception as error:  # any code may fail in any way on a proxy
            raise CaptureError(f"forward cannot be traced: {_reason(error)}") from error
        _restore_names(graph, [p.name for p in _parameters(module)])
        _add_variadic(graph, _signature(module))
        for node in graph.nodes:
            _mark(module, node)
    return graph


def _without_variadic(forward: FunctionType, signature: list[inspect.Parameter]) -> FunctionType:
    """A forward without the ``*args`` and ``**kwargs`` that it takes and never reads.

    Raises:
        CaptureError: it reads them.
    """
    names = {p.name for p in signature if p.kind in _VARIADIC}
    if not names:
        return forward
    code = forward.__code__
    read = {i.argval for i in dis.get_instructions(code) if "LOAD" in i.opname}
    if names & (read | {*code.co_cellvars}) or inspect.unwrap(forward) is not forward:
        raise CaptureError("forward passes *args or **kwargs on, which differ from call to call")
    flags = code.co_flags & ~(inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    plain = FunctionType(
        code.replace(co_flags=flags), forward.__globals__, forward.__name__,
        forward.__defaults__, forward.__closure__,
    )  # fmt: skip
    plain.__kwdefaults__ = forward.__kwdefaults__
    return plain


def _add_variadic(graph: Graph, signature: list[inspect.Parameter]) -> None:
    """Let a graph take, and not read, the variadic arguments that its forward takes."""
    inputs = {n.target: n for n in graph.find_nodes(op="placeholder")}
    before: Node | None = None
    for parameter in signature:
        if parameter.kind in _VARIADIC:
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            place = graph.inserting_before() if before is None else graph.inserting_after(before)
            with place:
                before = graph.placeholder(f"{stars}{parameter.name}")
        else:
            before = inputs[parameter.name]


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


def _reason(error: Exception) -> str:
    """Why code failed while it was traced, in words that do not ask for knowledge of tracing."""
    text = str(error).strip().split("\n")[0]
    why = next((why for part, why in _REASONS.items() if part in text), None)
    if why is None:
        unseen = "Proxy" in text or "proxy" in text or "__cuda_array_interface__" in text
        why = _NEEDS_VALUES if unseen else f"{type(error).__name__}: {text}"[:200]
    return f"{why}{_place(error)}"


_NEEDS_VALUES = "it hands a tensor or a shape to code that needs its values"
_REASONS = {
    "used in control flow": "it branches on the values of a tensor, or on a shape",
    "inputs to control flow": "it branches on the values of a tensor, or on a shape",
    "cannot be iterated": "it unpacks or loops over a tensor or a shape",
    "object does not support mutability": "it writes to a tensor or a list that it was given",
    "switches gradients or autocast": "it switches gradients or autocast on or off",
    "not traceable through": "it asks a tensor or a shape for its length",
    "'len'": "it asks a tensor or a shape for its length",
}


def _place(error: Exception) -> str:
    """The statement that failed."""
    where = ""
    frame = error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not file.startswith(_INNER):
            where = f" at {Path(file).name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return where


def _mark(module: nn.Module, node: Node) -> None:
    if node.op == "get_attr":
        value: Any = module
        for name in str(node.target).split("."):
            value = getattr(value, name)
    elif node.op == "call_module" and node.all_input_nodes:
        child = module.get_submodule(str(node.target))
        node.meta["may_multiply"] = reads.multiplies_arguments(child)
        return
    elif node.op == "call_module" and not node.args and not node.kwargs:
        # A parametrized weight: a module without an input, which may change its own buffers.
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            value = module.get_submodule(str(node.target))()
    else:
        return
    if isinstance(value, Tensor):
        weight = isinstance(value, nn.Parameter) or node.op == "call_module"
        stand_in = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta"
        )
        weight = weight or _is_computed(module, str(node.target))
        mark_stationary(node, stand_in, str(node.target) if weight else None)


def _is_computed(module: nn.Module, path: str) -> bool:
    """Whether an attribute is a plain tensor that hooks compute from parameters, call by call.

    So do ``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune``.
    """
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    value = holder.__dict__.get(name)
    hooks = holder._forward_pre_hooks.values()
    named = (getattr(h, "name", getattr(h, "_tensor_name", None)) for h in hooks)
    return isinstance(value, Tensor) and (value.requires_grad or name in named)


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
