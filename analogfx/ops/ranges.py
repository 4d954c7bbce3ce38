"""Ops that draw a seed, or follow the data with a range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analogfx.kernels import dispatch, noise, seen
from analogfx.kernels import reference as ref
from analogfx.kernels.patches import Window
from analogfx.kernels.spec import decode
from analogfx.ops.compilers import keep_in_order, keep_result, order_in_inductor
from analogfx.ops.define import LIBRARY, define, wide_like
from analogfx.ops.transforms import draws_by_sample


def _window(text: str) -> Window | None:
    """Geometry of a convolution; an empty text for none."""
    return decode(Window, text) if text else None


def _fake_seed(x: Tensor) -> Tensor:
    order_in_inductor(torch.ops.analogfx.draw_seed.default)
    return x.new_empty((), dtype=torch.int64)


define(
    "draw_seed",
    "Tensor x",
    "Tensor",
    lambda x: noise.draw_seed(x.device),
    _fake_seed,
)
keep_in_order(torch.ops.analogfx.draw_seed.default, LIBRARY)
keep_result(torch.ops.analogfx.draw_seed.default, LIBRARY)
draws_by_sample(torch.ops.analogfx.draw_seed.default, LIBRARY)

define(
    "normal_like",
    "Tensor x, Tensor seed, int stream",
    "Tensor",
    lambda x, seed, stream: noise.normal(seed, stream, x.shape, ref.wide(x.new_empty(0)).dtype),
    lambda x, seed, stream: wide_like(x),
    lambda ctx, inputs, output: None,
    lambda ctx, grad: (None, None, None),  # x gives the shape alone
)


def _update_range(*args: Any) -> tuple[Tensor, ...]:
    *before, window = args[:9]
    offsets = args[12] if len(args) > 12 else None
    return dispatch.update_range(*before, _window(window), *args[9:12], offsets=offsets)


define(
    "update_range",
    "Tensor x, Tensor input_range, Tensor count, Tensor x_min, Tensor x_max, str range_mode, "
    "int groups, int[] in_sizes, str window, int init_from_data, float init_std_alpha, "
    "float momentum, Tensor? offsets=None",
    "(Tensor, Tensor, Tensor, Tensor)",
    _update_range,
    lambda x, *state_and_rest: tuple(torch.empty_like(t) for t in state_and_rest[:4]),
)

keep_result(torch.ops.analogfx.update_range.default, LIBRARY)


def _collect_range(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    state, (range_mode, groups, in_sizes, window, init, alpha, momentum), rest = (
        args[:4],
        args[4:11],
        args[11:],
    )
    rule = seen.Rule(range_mode, init, alpha, momentum)
    return seen.collect(x, seen.Ranges(*state), rule, groups, in_sizes, _window(window), *rest)


# As update_range, where the step writes the ranges. Its leading arguments are the same.
define(
    "collect_range",
    "Tensor x, Tensor input_range, Tensor count, Tensor x_min, Tensor x_max, str range_mode, "
    "int groups, int[] in_sizes, str window, int init_from_data, float init_std_alpha, "
    "float momentum, Tensor notes, Tensor initializes, str processes, bool shares",
    "(Tensor, Tensor)",
    _collect_range,
    lambda x, *args: (torch.empty_like(args[2]), torch.empty_like(args[11])),
)
keep_result(torch.ops.analogfx.collect_range.default, LIBRARY)

# What a parameter holds once an update is stored in it. Not read from the parameter: a compiled
# checkpoint's backward would read what later calls have stored there.
define(
    "stored_range",
    "Tensor input_range, Tensor new",
    "Tensor",
    lambda input_range, new: new.clone(),
    lambda input_range, new: torch.empty_like(new),
    lambda ctx, inputs, output: None,
    lambda ctx, grad: (grad, None),  # to the parameter that holds the range
)
keep_result(torch.ops.analogfx.stored_range.default, LIBRARY)

define(
    "dynamic_range",
    "Tensor x",
    "Tensor",
    lambda x: ref.range_dynamic(x).to(ref.wide(x.new_empty(0)).dtype, copy=True),
    lambda x: wide_like(x, (*x.shape[:-1], 1)),
)
