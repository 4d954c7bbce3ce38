"""``analog_recurrence``: one layer of a recurrent network in one direction, all time steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from analogfx.kernels import recurrence
from analogfx.kernels.gates import CELLS
from analogfx.kernels.recurrence import Kept, Plan, Site
from analogfx.kernels.spec import MVMSpec, decode
from analogfx.ops.define import define

_SITES = ("ih", "hh", "hr")
_OF_SITE = ("weight", "bias", "range", "clip")
_TENSORS = 3 + len(_SITES) * len(_OF_SITE)
"""Arguments that have a gradient: x, h, c, and the operands of all sites."""

_INPUTS = "Tensor x, Tensor h, Tensor? c, " + "".join(
    f"Tensor? {what}_{site}, " for site in _SITES for what in _OF_SITE
)
_PLAN = "Tensor? seed, int[] sizes, bool reverse, bool keep, str cell, str ih, str hh, str hr"
_KEPT = 2 + 3 * len(_SITES)


def _sites(operands: Sequence[Any], texts: Sequence[str]) -> list[Site]:
    """The sites of a call; one without a text is absent."""
    made = []
    for n, text in enumerate(texts):
        if text:
            weight, bias, input_range, clip = operands[n * len(_OF_SITE) : (n + 1) * len(_OF_SITE)]
            made.append(Site(weight, bias, input_range, clip, decode(MVMSpec, text)))
    return made


def _split(args: Sequence[Any]) -> tuple[Any, list[Site], Tensor | None, Plan]:
    """The arguments of the op: (x, h, c), the sites, the seed and the plan."""
    tensors, rest = args[:_TENSORS], args[_TENSORS:]
    seed, sizes, reverse, keep, cell, *texts = rest
    return tensors[:3], _sites(tensors[3:], texts), seed, Plan(cell, reverse, sizes, keep)


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """As many as there may be sites."""
    return tensors + [tensors[0].new_empty(0) for _ in range(len(_SITES) - len(tensors))]


def _lists(kept: Kept) -> list[Tensor]:
    return [t for of_sites in kept[2:] for t in _padded(of_sites)]


def _forward(*args: Any) -> tuple[Tensor, ...]:
    (x, h, c), sites, seed, plan = _split(args)
    out, h, c, kept = recurrence.forward(x, h, c, sites, seed, plan)
    c = h.new_empty(0) if c is None else c
    return out, h, c, kept.gates, kept.cells, *_lists(kept)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    (x, h, c), sites, _, plan = _split(args)
    cell, rows = CELLS[plan.cell], x.shape[0]
    size = sites[1].weight.shape[0] // cell.gates
    nothing = x.new_empty(0)
    clipped, bases, draws = [], [], []
    for weight, _, _, _, spec in sites:
        planes = -(-len(spec.in_sizes) // 8)
        marks = (planes, rows, weight.shape[0]) if plan.keep and spec.out_bound else (0,)
        clipped.append(x.new_empty(marks, dtype=torch.uint8))
        seen = (rows, weight.shape[1]) if plan.keep and spec.noise_std else (0,)
        bases.append(x.new_empty(seen))
        drawn = (len(spec.in_sizes), rows, weight.shape[0]) if len(seen) > 1 else (0,)
        draws.append(x.new_empty(drawn))
    return (
        x.new_empty(rows, h.shape[1]),
        torch.empty_like(h),
        nothing if c is None else torch.empty_like(c),
        x.new_empty(rows, cell.kept * size) if plan.keep else x.new_empty(0),
        x.new_empty(rows if plan.keep and c is not None else 0, size),
        *(t for of_sites in (clipped, bases, draws) for t in _padded(of_sites)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.others = inputs[_TENSORS + 1 :]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[: _TENSORS + 1], output[0], *output[3:])


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (1 + len(ctx.others))
    if all(grad is None for grad in grads[:3]):
        return (None,) * _TENSORS + nothing
    needs = list(ctx.needs_input_grad[:_TENSORS])
    saved = ctx.saved_tensors
    op = torch.ops.analogfx.analog_recurrence_backward.default
    of_c = None if saved[2] is None else grads[2]
    found = op(*grads[:2], of_c, *saved, needs, *ctx.others)
    wanted = (g if need else None for g, need in zip(found, needs, strict=True))
    return (*wanted, *nothing)


def _backward(
    grad: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, *args: Any
) -> list[Tensor]:
    tensors, (seed, out, *saved), rest = (
        args[:_TENSORS],
        args[_TENSORS : _TENSORS + 2 + _KEPT],
        args[_TENSORS + 2 + _KEPT :],
    )
    needs, others = rest[0], rest[1:]
    (x, h, c), sites, _, plan = _split((*tensors, seed, *others))
    count = len(sites)
    gates, cells, *of_sites = saved
    lists = (of_sites[n : n + count] for n in range(0, len(of_sites), len(_SITES)))
    kept = Kept(gates, cells, *lists)
    of_site = len(_OF_SITE)
    asked = [needs[3 + n * of_site : 3 + (n + 1) * of_site] for n in range(count)]
    need_x = needs[0] or asked[0][_OF_SITE.index("range")]
    grad = torch.zeros_like(out) if grad is None else grad
    found = recurrence.backward(
        grad, grad_h, grad_c, x, h, c, sites, seed, plan, out, kept, need_x, asked
    )
    flat = [found.x, found.h, found.c, *(g for site in found.sites for g in site)]
    flat += [None] * (_TENSORS - len(flat))
    return [out.new_empty(0) if g is None or not need else g
            for g, need in zip(flat, needs, strict=True)]  # fmt: skip


def _fake_backward(*args: Any) -> list[Tensor]:
    tensors, needs = args[3 : 3 + _TENSORS], args[3 + _TENSORS + 2 + _KEPT]
    return [
        torch.empty_like(t) if need and t is not None else tensors[0].new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    ]


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "analog products have no second derivative: a gradient of a gradient needs the digital "
        "model, see to_digital()"
    )


define(
    "analog_recurrence_backward",
    "Tensor? grad, Tensor? grad_h, Tensor? grad_c, "
    + _INPUTS
    + "Tensor? seed, Tensor out, "
    + "".join(f"Tensor kept_{n}, " for n in range(_KEPT))
    + "bool[] needs, "
    + _PLAN.removeprefix("Tensor? seed, "),
    "Tensor[]",
    _backward,
    _fake_backward,
    lambda ctx, inputs, output: None,
    _no_second_derivative,
)
define(
    "analog_recurrence",
    _INPUTS + _PLAN,
    f"({', '.join(['Tensor'] * (3 + _KEPT))})",
    _forward,
    _fake,
    _setup,
    _differentiate,
)
