"""What Python functions call, read off their code without running it."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch

OPAQUE = object()
"""Stands for something callable whose code is not Python's, a jit function say."""


def functions_of(value: Any) -> Iterator[Any]:
    """The functions that calling a value may run directly, what decorators wrap included.

    Yields Python's and built-in functions, and :data:`OPAQUE` for what cannot be looked into.
    """
    pending: list[Any] = [value]
    seen: list[Any] = []
    while pending:
        value = pending.pop()
        if any(value is s for s in seen):
            continue
        seen.append(value)
        if isinstance(value, (FunctionType, types.BuiltinFunctionType)):
            yield value
        elif isinstance(value, (torch.jit.ScriptFunction, torch._ops.OpOverloadPacket)):
            yield OPAQUE
        pending.extend(_inside(value))


def _inside(value: Any) -> Iterator[Any]:
    """What a callable value runs that is another value."""
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        owner = getattr(value, "__self__", None)
        of_autograd = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
        yield owner if of_autograd and value.__name__ == "apply" else value.__func__
    elif isinstance(value, functools.partial):
        yield value.func
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():  # a decorator keeps what it wraps there
            try:
                inside = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(inside, (FunctionType, functools.partial, types.MethodType)):
                yield inside
        yield value.__dict__.get("__wrapped__")
    elif isinstance(value, type):
        if issubclass(value, torch.autograd.Function):
            yield value.forward
        elif not is_torchs(value):
            members = (value.__dict__.get(n) for n in ("__init__", "__new__", "__call__"))
            yield from (m for m in members if isinstance(m, FunctionType))
    elif _is_callable_object(value):
        yield type(value).__call__
        held = vars(value).values()
        yield from (v for v in held if isinstance(v, (FunctionType, types.BuiltinFunctionType)))


def _is_callable_object(value: Any) -> bool:
    """Whether a value is an object of a class in Python that can be called, and no module."""
    calls = (vars(base).get("__call__") for base in type(value).__mro__)
    return (
        isinstance(next((c for c in calls if c is not None), None), FunctionType)
        and hasattr(value, "__dict__")
        and not isinstance(value, torch.nn.Module)
        and not is_torchs(type(value))
    )


def is_torchs(value: Any) -> bool:
    """Whether something is defined in torch or Python itself."""
    if value is OPAQUE:
        return False
    home = str(getattr(value, "__module__", None) or "builtins")
    return home.partition(".")[0] in ("torch", "builtins", "_operator", "math")


def codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def reached(functions: Iterable[Any], attribute: Callable[[str], list[Any]]) -> Iterator[Any]:
    """Functions, and all that they call by name or attribute, as :func:`functions_of` gives them.

    The code of torch's own is followed only where it is a method.

    Args:
        attribute: what an attribute of a name may be, of the object that a method belongs to.
    """
    pending, seen = [(f, False) for f in functions], set()
    while pending:
        function, known = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        yield function
        if not isinstance(function, FunctionType) or known:
            continue
        for code in codes(function.__code__):
            for name in code.co_names:
                for value in attribute(name):
                    pending.extend((f, False) for f in functions_of(value))
                for value in [] if is_torchs(function) else _globals(function, name):
                    pending.extend((f, is_torchs(f)) for f in functions_of(value))


def _globals(function: FunctionType, name: str) -> list[Any]:
    """What a name may call in a function: a global, or a value of a table that is one."""
    value = function.__globals__.get(name)
    return [value, *value.values()] if type(value) is dict and len(value) < 64 else [value]


def mentions(
    functions: Iterable[Any],
    names: frozenset[str],
    attribute: Callable[[str], list[Any]] = lambda name: [],
) -> bool:
    """Whether functions, or what they call, are or mention one of some names or ``@``.

    What cannot be looked into counts, too.

    Args:
        names: of functions, without underscores around them.
        attribute: as for :func:`reached`.
    """
    return any(
        function is OPAQUE
        or function.__name__.strip("_") in names
        or (isinstance(function, FunctionType) and says(function.__code__, names))
        for function in reached(functions, attribute)
    )


@functools.lru_cache(4096)
def says(code: CodeType, names: frozenset[str]) -> bool:
    """Whether code mentions one of some names, underscores left out, or ``@``."""
    return any(
        any(name.strip("_") in names for name in inner.co_names)
        or any(
            i.argrepr in ("@", "@=") or i.opname == "BINARY_MATRIX_MULTIPLY"
            for i in dis.get_instructions(inner)
        )
        for inner in codes(code)
    )
