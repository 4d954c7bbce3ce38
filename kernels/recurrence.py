"""One layer of a recurrent network in one direction: all time steps in one call, and back.

A step is two products on tiles, of x and of h, and the gates of :mod:`analogfx.kernels.gates`;
an LSTM may have a third, which projects its h. The products are those of
:mod:`analogfx.kernels.linear`, with ranges that hold for the whole call. What does not depend on
the state is done for all steps at once: the product of x, what tiles hold, in the backward the
slopes of the gates, the masks of the converters and the gradients of the weights.

Every step sees noise of its own. Of the weights it is drawn as the rows of a step see it, see
:mod:`analogfx.kernels.row_noise`.

Rows of all steps lie in one tensor (R, features), step by step. Sequences come in the order of
their lengths, so that a step has the first ``sizes[t]`` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from analogfx.kernels import integers, noise, ready, row_noise
from analogfx.kernels import reference as ref
from analogfx.kernels.gates import CELLS
from analogfx.kernels.linear import converted, outer
from analogfx.kernels.spec import MVMSpec
from analogfx.kernels.weights import maxima, modified_weight, scale, tiles

_BITS = 8

_GROUP = 1 << 18
"""Elements of what is done at once for several steps."""


class Site(NamedTuple):
    """One product of every step."""

    weight: Tensor
    bias: Tensor | None
    input_range: Tensor | None
    """(k,), None unless the range is static or fast."""
    clip: Tensor | None
    """(k, O) or None."""
    spec: MVMSpec


class Plan(NamedTuple):
    """How the steps of a call follow one another."""

    cell: str
    """A name of ``gates.CELLS``."""
    reverse: bool
    sizes: list[int]
    """How many sequences have each step."""
    keep: bool = False
    """Whether to keep what the backward needs."""

    def steps(self) -> list[slice]:
        """The rows of every step, as the steps come."""
        made, start = [], 0
        for size in self.sizes:
            made.append(slice(start, start + size))
            start += size
        return made[:: -1 if self.reverse else 1]

    def groups(self, features: int) -> list[list[slice]]:
        """The steps as they come, in groups whose rows of so many features fit a cache."""
        count = max(1, _GROUP // max(1, features * max(self.sizes)))
        steps = self.steps()
        return [steps[start : start + count] for start in range(0, len(steps), count)]


def _rows(group: list[slice]) -> slice:
    """The rows of steps that follow one another."""
    if len(group) == 1:
        return group[0]
    return slice(min(step.start for step in group), max(step.stop for step in group))


def _within(step: slice, rows: slice) -> slice:
    """Where a step is among rows that hold it."""
    return slice(step.start - rows.start, step.stop - rows.start)


class Kept(NamedTuple):
    """What a call keeps for its backward; tensors without elements where there is nothing."""

    gates: Tensor
    """(R, kept * H)."""
    cells: Tensor
    """(R, H): c of an LSTM after every step."""
    clipped: list[Tensor]
    """For each site the bits of clipped outputs, uint8 (k / 8, R, O)."""
    bases: list[Tensor]
    """For each site what ``row_noise.read`` found, (R, I)."""
    draws: list[Tensor]
    """For each site what it read it with, (k, R, O)."""


class Gradients(NamedTuple):
    """Gradients by input; None where there is no such input, or none was asked for."""

    x: Tensor
    h: Tensor
    c: Tensor | None
    sites: list[SiteGradients]


class SiteGradients(NamedTuple):
    """Those of one site's operands."""

    weight: Tensor | None
    bias: Tensor | None
    input_range: Tensor | None
    clip: Tensor | None


def refusal(rows: int, sites: Sequence[tuple[MVMSpec, torch.dtype, torch.device]]) -> str:
    """Why a recurrence with gradients cannot run in one call; empty where it can.

    Args:
        rows: of the largest step.
        sites: for each product its spec, and its input's dtype and device.
    """
    for spec, dtype, device in sites:
        if device.type != "cpu":
            return f"the tensors are on {device.type}"
        if dtype not in (torch.float32, torch.float64):
            return f"it computes in float32 and float64, not {dtype}"
        if spec.range_mode == "dynamic":
            return "ranges depend on the input"
        depth = integers.depth(spec)
        if depth and max(spec.in_sizes) > depth:
            return "sums of codes go in parts"
        if spec.noise_std and not row_noise.saves(rows, sum(spec.out_sizes), min(spec.in_sizes)):
            return "steps have so many rows that the noisy weights are less to draw"
    return ""


# ------------------------------------------------------------------------------------- noise


class _Noise:
    """The noise of one site in one call: every step has its own."""

    def __init__(self, site: Site, seed: Tensor | None, number: int, rows: int) -> None:
        """``number`` tells the sites of a call apart."""
        spec = site.spec
        self._seed, self._number, self._rows, self._spec = seed, number, rows, spec
        peaks = maxima(site.weight, site.clip, spec)
        of_tile = [] if peaks is None else list(peaks)
        self.sigmas = [
            spec.noise_std * scale(p, spec.noise_per_channel, spec)
            for p in of_tile
            if spec.noise_std
        ]
        self._of_outputs = []
        if spec.out_noise:
            assert site.input_range is not None
            scales = [scale(p, spec.out_noise_per_channel, spec) for p in of_tile]
            pairs = zip(scales, site.input_range, strict=True)
            self._of_outputs = [a * (spec.out_noise * r) for a, r in pairs]
        self.dtype = ref.wide(site.weight.new_empty(0)).dtype

    def __bool__(self) -> bool:
        return bool(self.sigmas or self._of_outputs)

    def _normal(self, what: int, tile: int, features: int) -> Tensor:
        assert self._seed is not None
        stream = (tile * 3 + self._number) * 3 + what
        return noise.normal(self._seed, stream, (self._rows, features), self.dtype)

    def of_weights(self) -> Tensor:
        """What the forward draws for the weights of every tile, (k, R, O)."""
        outputs = sum(self._spec.out_sizes)
        draws = [self._normal(0, t, outputs) for t in range(len(self.sigmas))]
        if len(draws) == 1:
            return draws[0].unsqueeze(0)
        return torch.stack(draws) if draws else torch.empty(0, dtype=self.dtype)

    def of_gradients(self) -> list[Tensor]:
        """For every tile what the backward draws besides, (R, I)."""
        return [self._normal(1, t, size) for t, size in enumerate(self._spec.in_sizes)]

    def of_outputs(self) -> list[Tensor]:
        """For every tile the noise of its outputs, (R, O)."""
        outputs = sum(self._spec.out_sizes)
        return [
            self._normal(2, t, outputs).mul_(strength)
            for t, strength in enumerate(self._of_outputs)
        ]


class _Forward:
    """One site in the forward of a call."""

    def __init__(self, site: Site, seed: Tensor | None, number: int, plan: Plan) -> None:
        spec = site.spec
        rows, outputs = sum(plan.sizes), sum(spec.out_sizes)
        calls = len(plan.sizes) if number else 0  # x is multiplied for many steps at once
        operands = site.weight, site.bias, site.input_range, site.clip
        self._ready = ready.make(*operands, spec, calls, max(plan.sizes))
        noisy = _Noise(site, seed, number, rows)
        self._sigmas = noisy.sigmas
        self.draws, self._of_outputs = noisy.of_weights(), noisy.of_outputs()
        self._noisy = bool(noisy)
        self._spans = tiles(spec.in_sizes)
        keeps_basis = plan.keep and bool(noisy.sigmas)
        self.basis = site.weight.new_empty((rows, site.weight.shape[1]) if keeps_basis else 0)
        marks = plan.keep and spec.out_bound
        planes = -(-len(spec.in_sizes) // _BITS)
        self.clipped = site.weight.new_zeros(
            (planes, rows, outputs) if marks else (0,), dtype=torch.uint8
        )

    def __call__(self, x: Tensor, steps: list[slice]) -> Tensor:
        """The product of steps that follow one another: of all their rows."""
        whole = _rows(steps)

        def add(tile: int, z: Tensor, y: Tensor) -> None:
            for step in steps if self._sigmas else ():
                local = _within(step, whole)
                read, basis = row_noise.read(z[local], self.draws[tile, step])
                y[local].addcmul_(read, self._sigmas[tile])
                if self.basis.numel():
                    self.basis[step, self._spans[tile][1]] = basis
            if self._of_outputs:
                y.add_(self._of_outputs[tile][whole])

        def note(tile: int, y: Tensor, bounded: Tensor) -> None:
            if not torch.equal(y, bounded):  # the least time where, as mostly, nothing is clipped
                marks = self.clipped[tile // _BITS, whole]
                marks.bitwise_or_((y != bounded).view(torch.uint8) << tile % _BITS)

        keeps = note if self.clipped.numel() else None
        return ready.linear(x, self._ready, add if self._noisy else None, keeps)


# ----------------------------------------------------------------------------------- forward


def forward(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    sites: list[Site],
    seed: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor | None, Kept]:
    """All steps of a layer.

    Args:
        x: (R, I).
        h: (N, P), the state before the first step; P = H without a projection.
        c: (N, H), of an LSTM.
        sites: of x, of h, and of a projection if there is one.
        seed: int64 (), None unless something is noisy.

    Returns:
        The outputs (R, P), the state after the last step, and what the backward needs.
    """
    cell, rows = CELLS[plan.cell], sum(plan.sizes)
    size = sites[1].weight.shape[0] // cell.gates
    runs = [_Forward(site, seed, number, plan) for number, site in enumerate(sites)]
    of_x, of_h, *of_projection = runs
    longest = max(plan.sizes)
    out, inner = x.new_empty(rows, h.shape[1]), x.new_empty(longest, size)
    kept = x.new_empty(rows if plan.keep else longest, cell.kept * size)
    keeps_cells = plan.keep and c is not None
    cells = x.new_empty(rows if keeps_cells else 0, size)

    even = len({*plan.sizes}) == 1  # then an output is the next step's state as it is
    h = h.clone()
    cell_state = None if c is None else c.clone()
    for group in plan.groups(cell.gates * size):
        whole = _rows(group)
        gates_x = of_x(x[whole], group)
        for step in group:
            n = step.stop - step.start
            now = inner[:n] if of_projection else out[step]
            gates_h = of_h(h if even else h[:n], [step])
            keeps = kept[step] if plan.keep else kept[:n]
            before = h if cell_state is None else cell_state
            before = before if even else before[:n]
            cell.step(gates_x[_within(step, whole)], gates_h, before, keeps, now)
            if keeps_cells:
                cells[step] = before
            if of_projection:
                out[step] = of_projection[0](now, [step])
            if even:
                h = out[step]
            else:
                h[:n] = out[step]
    found = Kept(
        kept if plan.keep else kept.new_empty(0),
        cells,
        [run.clipped for run in runs],
        [run.basis for run in runs],
        [run.draws if plan.keep else run.draws.new_empty(0) for run in runs],
    )
    return out, h.clone() if even else h, cell_state, found


# ---------------------------------------------------------------------------------- backward


class _Backward:
    """One site in the backward of a call."""

    def __init__(
        self,
        site: Site,
        x: Tensor,
        seed: Tensor | None,
        number: int,
        kept: Kept,
        needs_x: bool,
    ) -> None:
        """``x``: (R, I), its inputs in all steps."""
        spec = site.spec
        self._site, self._x, self._needs_x = site, x, needs_x
        self._basis, self._draws = kept.bases[number], kept.draws[number]
        self._spans = tiles(spec.in_sizes)
        quiet = spec._replace(noise_std=0.0)
        peaks = maxima(site.weight, site.clip, spec)
        self._held = modified_weight(site.weight, site.clip, None, peaks, quiet)
        noisy = _Noise(site, seed, number, len(x))
        self._sigmas = noisy.sigmas if needs_x else []
        self._fresh = noisy.of_gradients() if self._sigmas else []
        self._clipped = kept.clipped[number]
        self._clips = bool(self._clipped.numel()) and bool(self._clipped.any())
        self._at_dac = x.new_empty(x.shape if needs_x else 0)
        self._ranges: list[Tensor | None] = [None] * len(self._spans)
        if site.input_range is not None:
            self._ranges = list(site.input_range)
        self._beyond = needs_x and any(
            r is not None and bool(_magnitude(x[:, s]) > r)
            for (_, s), r in zip(self._spans, self._ranges, strict=True)
        )

    def _passed(self, g: Tensor, tile: int, rows: slice) -> Tensor:
        """What a tile's ADC lets through of the gradient of its outputs."""
        if not self._clips:
            return g
        clipped = self._clipped[tile // _BITS, rows] & (1 << tile % _BITS)
        return g.masked_fill(clipped.bool(), 0.0)

    def __call__(self, g: Tensor, steps: list[slice]) -> Tensor:
        """The gradient of the inputs of steps that follow one another, by that of their outputs."""
        self.to_dac(g, steps)
        return self._through_clamp(_rows(steps)) if self._beyond else self._at_dac[_rows(steps)]

    def through_dac(self) -> Tensor:
        """The gradient of the inputs of all steps, once all have gone :meth:`to_dac`."""
        return self._through_clamp(slice(0, len(self._x))) if self._beyond else self._at_dac

    def _through_clamp(self, rows: slice) -> Tensor:
        made = self._at_dac[rows].clone()
        for (_, s), r in zip(self._spans, self._ranges, strict=True):
            if r is not None:
                made[:, s].mul_(ref.inside(self._x[rows, s], r))
        return made

    def to_dac(self, g: Tensor, steps: list[slice]) -> None:
        """Find the gradient of what the DAC gave for steps, by that of their outputs."""
        whole = _rows(steps)
        at_dac = self._at_dac[whole]
        if not (self._clips or self._sigmas):
            torch.mm(g, self._held, out=at_dac)
            return
        for t, s in self._spans:
            passed = self._passed(g, t, whole)
            at_dac[:, s] = torch.mm(passed, self._held[:, s])
            if self._sigmas:
                self._read_back(t, passed * self._sigmas[t], steps, whole)

    def _read_back(self, tile: int, g: Tensor, steps: list[slice], whole: slice) -> None:
        s = self._spans[tile][1]
        for step in steps:
            draws = self._draws[tile, step], self._fresh[tile][step]
            self._at_dac[step, s] += row_noise.read_back(
                g[_within(step, whole)], self._basis[step, s], *draws
            )

    def gradients(self, g: Tensor, plan: Plan, needs: Sequence[bool]) -> SiteGradients:
        """Those of the operands, once all steps are done.

        Args:
            g: (R, O), the gradient of the outputs of all steps.
            needs: of weight, bias, range and clip.
        """
        site, (need_w, need_bias, need_range, need_clip) = self._site, needs
        weight = clip = None
        if need_w or need_clip:
            parts = [
                converted(self._x[:, s], r, site.spec)
                for (_, s), r in zip(self._spans, self._ranges, strict=True)
            ]
            if self._clips:
                whole = slice(0, len(g))
                pairs = zip(self._spans, parts, strict=True)
                parts = [outer(self._passed(g, t, whole), part) for (t, _), part in pairs]
                weight = torch.cat(parts, 1)
            else:
                weight = outer(g, parts[0] if len(parts) == 1 else torch.cat(parts, 1))
            if site.clip is not None:
                weight, clip = self._through_clip(weight, site.clip)
        of_range = self._of_range(plan) if need_range else None
        return SiteGradients(weight, g.sum(0) if need_bias else None, of_range, clip)

    def _through_clip(self, grad: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
        site = self._site
        pairs = [
            ref.weight_backward(grad[:, s], site.weight[:, s], clip[t], site.spec.weight_states)
            for t, s in self._spans
        ]
        weights, clips = zip(*pairs, strict=True)
        return torch.cat(weights, 1), torch.stack(clips).to(clip.dtype)

    def _of_range(self, plan: Plan) -> Tensor:
        """(k,): decay counts in every step for itself."""
        spec, made = self._site.spec, []
        for (_, s), r in zip(self._spans, self._ranges, strict=True):
            assert r is not None
            grad, x = self._at_dac[:, s], self._x[:, s]
            if spec.range_mode == "fast":
                made.append(ref.range_grad_fast(grad, x, r))
                continue
            reaches = bool(_magnitude(x) >= r)
            beyond = ref.saturated(x, r) if reaches else None
            total = r.new_zeros(()) if beyond is None else ref.saturation_grad(grad, x, beyond) * r
            if spec.decay > 0:
                shares = r.new_zeros(len(plan.sizes))
                if beyond is not None:
                    parts = beyond.sum(1).split(plan.sizes)
                    shares = torch.stack([part.mean() for part in parts]) / x.shape[1]
                total = total + spec.decay * r * (1.0 - shares > spec.input_min_percentage).sum()
            made.append(total)
        return torch.stack(made)


def _magnitude(x: Tensor) -> Tensor:
    """The largest |x|, ()."""
    if not x.numel():
        return x.new_zeros(())
    low, high = x.aminmax()
    return torch.maximum(-low, high)


def _before(after: Tensor, first: Tensor, plan: Plan) -> Tensor:
    """The states before every step, (R, H), from those after every step and the very first."""
    made, state = torch.empty_like(after), first.clone()
    for step in plan.steps():
        n = step.stop - step.start
        made[step] = state[:n]
        state[:n] = after[step]
    return made


def backward(
    grad: Tensor,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    sites: list[Site],
    seed: Tensor | None,
    plan: Plan,
    out: Tensor,
    kept: Kept,
    need_x: bool,
    needs: Sequence[Sequence[bool]],
) -> Gradients:
    """Gradients of :func:`forward`.

    Args:
        grad: (R, P), of the outputs.
        grad_h, grad_c: (N, P) and (N, H), of the last state; None for zeros.
        out, kept: what the forward returned.
        need_x: whether to return a gradient of x or its range.
        needs: for every site, of weight, bias, range and clip.
    """
    cell = CELLS[plan.cell]
    h_before = _before(out, h, plan)
    before, after = h_before, out
    if c is not None:
        before, after = _before(kept.cells, c, plan), kept.cells
    of_x = _Backward(sites[0], x, seed, 0, kept, need_x)
    of_h = _Backward(sites[1], h_before, seed, 1, kept, True)
    of_projection = None
    projected = x.new_empty(0)
    if len(sites) > 2:
        inner = torch.tanh(kept.cells).mul_(kept.gates[:, -kept.cells.shape[1] :])
        of_projection, projected = _Backward(sites[2], inner, seed, 2, kept, True), grad.clone()

    dh = torch.zeros_like(h) if grad_h is None else grad_h.clone()
    dc = None
    if c is not None:
        dc = torch.zeros_like(c) if grad_c is None else grad_c.clone()
    rows, features = len(out), sites[1].weight.shape[0]
    gates_h = x.new_empty(rows, cell.gates, features // cell.gates)
    gates_x = torch.empty_like(gates_h) if cell.apart else gates_h
    for group in reversed(plan.groups(features)):
        whole = _rows(group)
        slopes = cell.slopes(kept.gates[whole], before[whole], after[whole])
        for step in reversed(group):
            n = step.stop - step.start
            d = dh[:n].add_(grad[step])
            if of_projection is not None:
                projected[step] = d
                d = of_projection(d, [step])
            places = gates_h[step], gates_x[step]
            past = slopes.at(_within(step, whole)).back(d, None if dc is None else dc[:n], *places)
            back = of_h(places[0].flatten(1), [step])
            dh[:n] = back if past is None else back + past
        if need_x:
            of_x.to_dac(gates_x[whole].flatten(1), group)

    found = [
        of_x.gradients(gates_x.flatten(1), plan, needs[0]),
        of_h.gradients(gates_h.flatten(1), plan, needs[1]),
    ]
    if of_projection is not None:
        found.append(of_projection.gradients(projected, plan, needs[2]))
    return Gradients(of_x.through_dac() if need_x else x.new_empty(0), dh, dc, found)
