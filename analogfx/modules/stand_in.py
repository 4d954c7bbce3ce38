"""A stand-in for a module, to be traced in its place.

It has the module's code, parameters, buffers and children; what else it holds is a copy. So a
forward that runs on proxies puts none of them into the module's own lists and caches, and other
threads that run the module see nothing of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

Read = Callable[[str, Any], Any]
Call = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class StandIn:
    """A stand-in for a module and all modules inside it."""

    def __init__(
        self, module: nn.Module, read: Read, call: Call, forwards: Mapping[Any, Any]
    ) -> None:
        """Copy a module without its tensors.

        Args:
            read: turns (name, value) of a parameter, buffer or child into what a forward gets.
            call: what a call of a module inside becomes, as (module, args, kwargs).
            forwards: what runs where a class calls the forward that it inherits, by that forward.
        """
        self._read, self._call, self._forwards = read, call, forwards
        self._twins: dict[int, Any] = {}
        self._copied: list[tuple[str, Any, Any]] = []
        self._classes: dict[type, Any] = {}
        modules = dict(module.named_modules())
        for inner in modules.values():
            cls = self._class(type(inner))
            self._twins[id(inner)] = object.__new__(cls)  # FSDP2's makes another class
        for inner in modules.values():
            self._fill(inner, self._twins[id(inner)])
        self.module: nn.Module = self._twins[id(module)]

    def _class(self, cls: type) -> Any:
        """A subclass that reads and calls as the tracer says; nothing of the class is patched."""
        if cls not in self._classes:
            read, call = self._read, self._call

            def __getattr__(self: Any, name: str) -> Any:
                return read(name, super(made, self).__getattr__(name))  # type: ignore[misc, arg-type]

            def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
                return call(self, args, kwargs)

            members = {
                "__getattr__": __getattr__,
                "__call__": __call__,
                "__setattr__": nn.Module.__setattr__,
                "__delattr__": nn.Module.__delattr__,
                "__module__": cls.__module__,
            }
            made = type(cls)(cls.__name__, (cls, *self._inherited(cls)), members)
            self._classes[cls] = made
        return self._classes[cls]

    def _inherited(self, cls: type) -> list[Any]:
        """Classes that come before the bases whose forward another one runs for."""
        return [
            type(base)(base.__name__, (base,), {"forward": self._forwards[own]})
            for base in cls.__mro__[1:]
            if (own := base.__dict__.get("forward")) in self._forwards
        ]

    def _fill(self, module: nn.Module, twin: nn.Module) -> None:
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
                twin.__dict__[name] = value.copy()
            elif name == "_modules":
                children = {k: m and self._twins[id(m)] for k, m in value.items()}
                twin.__dict__[name] = children
            elif name not in _PRIVATE:
                twin.__dict__[name] = self._copy(name, value)
            else:
                twin.__dict__[name] = value

    def _copy(self, name: str, value: Any) -> Any:
        """A value that can be changed without changing the module's; tensors are shared."""
        if isinstance(value, _SHARED):
            return value
        if id(value) in self._twins:
            return self._twins[id(value)]
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self._copy(name, value.__self__))
        kind: Any = type(value)
        if kind is tuple:
            return tuple(self._copy(name, v) for v in value)
        twin: Any
        if kind is list:
            twin = self._twins[id(value)] = []
            twin.extend(self._copy(name, v) for v in value)
        elif kind is dict:
            twin = self._twins[id(value)] = {}
            twin.update((k, self._copy(name, v)) for k, v in value.items())
        elif kind is set:
            twin = self._twins[id(value)] = set(value)
        elif _is_plain(value):
            twin = self._twins[id(value)] = kind.__new__(kind)
            twin.__dict__.update((k, self._copy(name, v)) for k, v in value.__dict__.items())
        else:
            return value
        self._copied.append((name, list(_parts(twin)), twin))
        return twin

    def changed(self) -> str | None:
        """The attribute whose contents the forward changed, None if it changed none."""
        for name, before, twin in self._copied:
            after = list(_parts(twin))
            same = len(after) == len(before) and all(map(_is, after, before))
            if not same or any(isinstance(part, Proxy) for part in after):
                return name
        return None


_SHARED = (Tensor, type, str, int, float, bool, type(None))
_PRIVATE = nn.Module().__dict__.keys()


def _is(first: Any, second: Any) -> bool:
    return first is second


def _parts(value: Any) -> Iterator[Any]:
    """What a copied value holds, keys included."""
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, (list, set)):
        yield from value
    else:
        yield from value.__dict__
        yield from value.__dict__.values()


def _is_plain(value: Any) -> bool:
    """Whether an object is what its ``__dict__`` holds: of a class written in Python alone."""
    kind: Any = type(value)
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, nn.Module)
        and kind.__module__.partition(".")[0] not in ("torch", "builtins", "threading")
        and kind.__new__ is object.__new__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__basicsize__ == _Plain.__basicsize__
        and not hasattr(kind, "__del__")
    )


class _Plain:
    pass
