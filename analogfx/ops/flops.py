"""How many floating-point operations a product counts for torch's ``FlopCounterMode``.

As many as torch counts for the digital product of the same shapes; converters are not counted, as
torch counts no elementwise op.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

# A formula is given shapes where its op is given tensors.
Shape = list[int]


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Two for every weight and row."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _products(needs: list[bool]) -> list[bool]:
    """Whether a backward multiplies for the inputs or their range, and for the weights."""
    need_x, need_weight, _, need_range, need_clip = needs
    return [need_x or need_range, need_weight or need_clip]


def _linear_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """A product of the forward's size for each of two gradients."""
    return sum(_products(rest[5])) * _linear(x, weight)


def _conv(x: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    from torch.utils.flop_counter import conv_flop_count

    return conv_flop_count(x, weight, out_shape[0])


def _conv_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    from torch.utils.flop_counter import conv_backward_flop

    count: Any = conv_backward_flop  # is given `out_val`, which its type calls `out_shape`
    # Neither bias nor geometry nor groups are read, but whether it is transposed.
    others = None, None, None, None, False, None, None
    needs = [*_products(rest[5]), False]
    return count(grad, x, weight, *others, needs, out_val=[x, weight, None])


def _mvm(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Two for every weight and row. The op's backward is made of ops that torch counts."""
    return 2 * math.prod(x[: 1 - len(weight)]) * math.prod(weight)


def _experts(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Two for every row and every weight of its expert."""
    return 2 * math.prod(x) * weight[1]


def _experts_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    return sum(_products(rest[5])) * _experts(x, weight)


FORMULAS: dict[str, Callable[..., int]] = {
    "analog_linear": _linear,
    "analog_linear_backward": _linear_backward,
    "analog_conv": _conv,
    "analog_conv_backward": _conv_backward,
    "analog_experts": _experts,
    "analog_experts_backward": _experts_backward,
    "mvm": _mvm,
    "expert_mvm": _experts,
    "expert_mvm_backward": lambda grad, x, weight, *_, **__: 2 * _experts(x, weight),
    "digital_experts": _experts,
}
"""By the op's name in the namespace ``analogfx``."""


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in FORMULAS.items():
        register: Any = register_flop_formula(getattr(torch.ops.analogfx, name))
        register(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the formulas when torch's counter has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_counted() -> None:
    """Let ``FlopCounterMode`` count analog products, now or once somebody imports it.

    Not imported here: it imports triton, which takes 0.1 s and settles whether Triton's
    interpreter is used.
    """
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
