"""What happens to the operands of a site before its first op: autocast, and a check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(x: Any) -> Any:
    """``x`` in the dtype that ``nn.Linear`` would compute in here: autocast's, if it is on."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or x.is_meta:
        return x
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def checked(
    x: Any, weight: Tensor, bias: Tensor | None, features: int, dims: int, name: str
) -> Tensor:
    """``x`` as it is, if a site can multiply it: before its ranges follow the data.

    Args:
        features: length of x's last axis, or number of channels of an image.
        dims: spatial axes of an image, 0 for a linear product.
        name: the module's path, for the message.

    Raises:
        TypeError: not a tensor, not dense, or not of floating point.
        RuntimeError: of the wrong shape, or of another dtype or device than the weight.
    """
    where = f"{name}: " if name else ""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}expected a tensor of floating point, found {found}")
    if x.is_nested:
        raise TypeError(
            f"{where}expected a dense tensor, found a nested one: call .to_padded_tensor(0.0)"
        )
    if x.layout != torch.strided:
        found = str(x.layout).removeprefix("torch.")
        raise TypeError(f"{where}expected a dense tensor, found {found}: call .to_dense()")
    fits = x.dim() in (dims + 1, dims + 2) if dims else x.dim() > 0
    if not fits or x.shape[-1 - dims] != features:
        wanted = f"(batch, {features}{', size' * dims})" if dims else f"(..., {features})"
        raise RuntimeError(f"{where}expected an input {wanted}, found {tuple(x.shape)}")
    for operand, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise RuntimeError(
                f"{where}the input is {x.dtype}, the {operand} {t.dtype}: "
                "cast one of them, or run under torch.autocast"
            )
    if x.device != weight.device:
        raise RuntimeError(f"{where}the input is on {x.device}, the weight on {weight.device}")
    return x
