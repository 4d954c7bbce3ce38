"""Whether a file computes what the model computes.

First site by site: from the input that the file's site sees, its output must lie in the interval
that rounding leaves (:mod:`analogfx.onnx.interval`). That is narrow, and tells which site is off.
Then on inputs that drive its codes to their ends (:mod:`analogfx.onnx.drive`).

Last from end to end, also on other sizes. Two programs that sum the same products in another order
differ by rounding, and where a converter rounds, a difference of one bit can become a whole step,
which the next layers carry on. How far that may go depends on the model; so it is measured: the
model runs once more with every product of its tiles and every digital result off by a small
relative error, which is well above float rounding. A file is accepted if it stays closer to the
model than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from analogfx.errors import OnnxError
from analogfx.modules.program import explicit_level
from analogfx.onnx.arguments import bound, other_batches, other_lengths, sharing, tensors_of
from analogfx.onnx.drive import Driven, driven, run_apart
from analogfx.onnx.interval import interval
from analogfx.onnx.runtimes import Run, host, load
from analogfx.onnx.sites import Programmed
from analogfx.ops import held

ERROR = {
    # Not 1e-14: between sites, a double model's file is of float32 precision. ONNX's attributes are
    # float32 (the epsilon of a norm), torch's exporter writes a Python number as a float32 constant
    # and a Cast (x * 0.1), and where ONNX Runtime has no kernel for doubles (Erf, so GELU), ONNX's
    # reference evaluator takes over, whose Erf is float32's. Each is off by at most 2^-24; this is
    # two such. Sites themselves are exact to double's rounding.
    torch.float64: 1e-7,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""Relative error that is put on results, by their dtype.

In units in the last place (twice the rounding): 84 of float, 4 of float16 and bfloat16. Wide,
because sites are checked closely by themselves before.
"""

_ATTEMPTS = 8
"""Draws of that error. A rounding tie falls either way, so one draw can miss what a tie does."""

_TIES = math.sqrt(2)
"""A draw moves about half of the values at a tie; another program may move all of them."""

_aten = torch.ops.aten
_SUMS = {
    torch.ops.analogfx.mvm.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default,
    _aten.baddbmm.default, _aten.convolution.default, _aten.native_layer_norm.default,
    _aten.native_group_norm.default, _aten.native_batch_norm.default, _aten._softmax.default,
    _aten._log_softmax.default, _aten.cumsum.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip
"""Beside the ops that torch itself marks as reductions."""


class _Inexact(TorchDispatchMode):
    """Puts a relative error on whatever two programs may round apart.

    A sum is off relative to all that was summed, for which the size of all results stands; an
    elementwise function, such as tanh, relative to its result.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in held.IMPLEMENTATIONS:  # step by step, as the explicit level shows other sites
            with self:
                return held.IMPLEMENTATIONS[func](*args)
        out = func(*args, **(kwargs or {}))
        first, *rest = out if isinstance(out, tuple) else (out,)
        is_sum = func in _SUMS or torch.Tag.reduction in func.tags
        if not is_sum and torch.Tag.pointwise not in func.tags:
            return out
        if func._schema.is_mutable or getattr(first, "dtype", None) not in ERROR:
            return out
        inexact = self._inexact(first, is_sum)
        return (inexact, *rest) if isinstance(out, tuple) else inexact

    def _inexact(self, y: Tensor, is_sum: bool) -> Tensor:
        if y.numel() == 0:
            return y
        draw = torch.randn(y.shape, generator=self.generator).to(y)
        size = y.abs()
        if is_sum:
            size = size + y.float().square().mean().sqrt().to(y)
        return torch.where(y.isfinite(), y + draw * size * ERROR[y.dtype], y)


class Probe(NamedTuple):
    """Where a call of a site is in a file: names of its values."""

    site: Programmed
    label: str
    """Name of the call's node."""
    x: str
    y: str
    bias: str | None
    """None for a site without a bias."""
    integer: bool
    """Whether the file multiplies codes by codes here."""


def check(
    file: Path,
    analog: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    probes: Sequence[Probe],
    lengths: bool = True,
) -> None:
    """Run a file on the given inputs and on other sizes, and compare.

    Args:
        probes: every call of a site.
        lengths: whether one input may grow by itself; a mask over past and new tokens may not.

    Raises:
        OnnxError: it does not run, or differs by more than rounding can explain.
    """
    call = args, dict(kwargs)
    inputs = tensors_of(bound(analog, *call))
    _check_numbers("input", inputs)
    with torch.no_grad():
        _check_numbers(f"{type(analog).__name__}: output", tensors_of(analog(*args, **kwargs)))
    _check_sites(file, analog, inputs, probes)
    run = load(file)
    batched, sequences = _free(file, inputs)
    for variant in [call, *(other_batches(call, batched) if batched else ())]:
        _compare(run, analog, *variant)
    for variant in other_lengths(call, sequences) if sequences and lengths else ():
        if _takes(analog, *variant):  # positions may end where the given sequence ends
            _compare(run, analog, *variant)


def _free(file: Path, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs that have the free batch of a file, and those that have its free sequence."""
    places = onnx.load(file, load_external_data=False).graph.input
    sizes = [place.type.tensor_type.shape.dim for place in places]
    pairs = list(zip(inputs, sizes, strict=True))
    first, second = (
        [t for t, dims in pairs if len(dims) > axis and dims[axis].dim_param] for axis in (0, 1)
    )
    return sharing(first, 0), sharing(second, 1)


def _takes(analog: nn.Module, args: Any, kwargs: Any) -> bool:
    try:
        with torch.no_grad():
            analog(*args, **kwargs)
    except Exception:  # whatever the model's own code raises
        return False
    return True


# --------------------------------------------------------------------------------- site by site


def _check_sites(
    file: Path, analog: nn.Module, inputs: Sequence[Tensor], probes: Sequence[Probe]
) -> None:
    """Refuse a file in which a site's output is not what its own input allows.

    Every site is checked on what the model gives it, and on inputs that drive its codes to the
    ends.
    """
    biases = {p.bias for p in probes if p.bias}
    values = _values(file, inputs, {name for p in probes for name in (p.x, p.y)} | biases)
    for probe in probes:
        _check_site(analog, probe, values[probe.x], values)
    calls = [Driven(p.label, p.x, p.y, driven(p.site, values[p.x])) for p in probes]
    outputs = run_apart(file, calls, biases, values)
    for probe, call in zip(probes, calls, strict=True):
        _check_site(analog, probe, call.given, outputs, ", driven to the ends of its codes,")


def _check_site(
    analog: nn.Module, probe: Probe, x: Tensor, values: Mapping[str, Tensor], how: str = ""
) -> None:
    y = values[probe.y]
    bias = values[probe.bias] if probe.bias else None
    low, high = interval(probe.site, x, bias, probe.integer)
    lost = y.isnan() & low.isfinite() & high.isfinite()
    outside = (y < low) | (y > high) | lost
    if outside.any():
        worst = torch.maximum(low - y, y - high)[outside].max().item()
        raise OnnxError(
            f"the exported model disagrees with {type(analog).__name__} at {probe.label}: "
            f"{int(outside.sum())} of its {y.numel()} outputs{how} are off by more than rounding "
            f"explains, by up to {worst:.3g}. {_REMEDY[probe.integer]}"
        )


_REMEDY = {
    True: "The integer kernels of ONNX Runtime on this machine are not exact: another version may "
    'be, and level="standard" does without them',
    False: "A kernel of ONNX Runtime differs from its operator: another version, opset or level "
    "may do",
}
"""By whether a site multiplies integers."""


def _check_numbers(what: str, tensors: Sequence[Tensor]) -> None:
    """Refuse NaN, which no comparison would find."""
    for number, t in enumerate(tensors):
        if t.is_floating_point() and t.isnan().any():
            raise OnnxError(
                f"{what} {number} holds {int(t.isnan().sum())} NaN in {t.numel()} values, which "
                "can be compared with nothing: verify needs an example and a model without NaN"
            )


def _values(file: Path, inputs: Sequence[Tensor], names: set[str]) -> dict[str, Tensor]:
    """Values inside a file, by name."""
    model = onnx.load(file, load_external_data=False)
    found = dict(zip((place.name for place in model.graph.input), map(host, inputs), strict=True))
    known = {*found, *(place.name for place in model.graph.output)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - known))
    opened = file.with_name("opened.onnx")
    opened.write_bytes(model.SerializeToString())
    outputs = [place.name for place in model.graph.output]
    return found | dict(zip(outputs, load(opened)(inputs), strict=True))


# ----------------------------------------------------------------------------------- end to end


def _compare(run: Run, analog: nn.Module, args: Any, kwargs: Any) -> None:
    """Refuse a file that strays further from the model than rounding may."""
    inputs = tensors_of(bound(analog, args, kwargs))
    try:
        with torch.no_grad():
            expected = tensors_of(analog(*args, **kwargs))
    except Exception as error:  # whatever the model's own code raises
        raise OnnxError(
            f"{type(analog).__name__} does not take inputs of {[tuple(t.shape) for t in inputs]}, "
            f"though their first axis was exported as a free batch: {error}. Fix the shapes with "
            "dynamic_shapes=False (--static)"
        ) from error
    found = run(inputs)
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        raise OnnxError(f"the exported model returns {shapes[0]}, the model returns {shapes[1]}")
    off = [distance(f, e) for f, e in zip(found, expected, strict=True)]
    allowed = [0.0] * len(off)
    for seed in range(_ATTEMPTS):
        if all(o <= a for o, a in zip(off, allowed, strict=True)):
            return
        with torch.no_grad(), explicit_level(), _Inexact(seed):
            inexact = tensors_of(analog(*args, **kwargs))
        measured = [distance(i, e) for i, e in zip(inexact, expected, strict=True)]
        allowed = [max(a, _TIES * m) for a, m in zip(allowed, measured, strict=True)]
    worst = max(range(len(off)), key=lambda n: off[n] - allowed[n])
    if off[worst] > allowed[worst]:
        raise OnnxError(
            f"the exported model disagrees with {type(analog).__name__}: output {worst} for inputs "
            f"of {[tuple(t.shape) for t in inputs]} is off by {off[worst]:.3g} (rms, relative), "
            f"where rounding explains {allowed[worst]:.3g}. Its sites are right by themselves: "
            "look for code that depends on sizes or values, and for digital operators"
        )


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected; infinite for NaNs apart."""
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found.cpu(), expected.cpu()) else float("inf")
    f, e = found.double().cpu(), expected.double().cpu()
    if not torch.equal(torch.isfinite(f), torch.isfinite(e)):
        return float("inf")
    apart = torch.nan_to_num(f - e, nan=0.0, posinf=0.0, neginf=0.0)
    size = torch.nan_to_num(e, nan=0.0, posinf=0.0, neginf=0.0).square().mean().sqrt()
    return float(apart.square().mean().sqrt() / size) if size else float(apart.abs().max())
