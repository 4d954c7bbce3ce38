"""How an op is named to torch: schema, implementation, fake, derivative and autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from analogfx.ops.transforms import differentiable

LIBRARY = torch.library.Library("analogfx", "DEF")

# Inside a site autocast has had its say (see `autocast`): nothing below may be cast again.
_AUTOCAST = (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA)


def define(
    name: str,
    arguments: str,
    returns: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register one op with its schema, implementation, fake and (if it has one) derivative."""
    LIBRARY.define(f"{name}({arguments}) -> {returns}")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"analogfx::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.analogfx, name).default
    if backward is not None:
        assert setup is not None
        LIBRARY.impl(name, differentiable(op, setup, backward), "Autograd", with_keyset=True)
    for key in _AUTOCAST:

        def below_autocast(*args: Any, _key: Any = key, _op: Any = op) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return _op(*args)

        LIBRARY.impl(name, below_autocast, key.name)


def wide_like(x: Tensor, shape: Sequence[Any] | None = None) -> Tensor:
    """An empty tensor in the precision that sites compute in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape if shape is None else shape, dtype=dtype)
