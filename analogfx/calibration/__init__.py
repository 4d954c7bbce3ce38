"""Input ranges, and the bound of the ADCs, from data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from analogfx.calibration.adc import OutputPass
from analogfx.calibration.batches import caller
from analogfx.calibration.estimators import METHODS, Settings
from analogfx.calibration.ranges import InputPass
from analogfx.calibration.result import Calibration, SiteCalibration
from analogfx.config import TorchInferenceRPUConfig
from analogfx.errors import CalibrationError
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.plan import site_name
from analogfx.modules.program import AnalogSite
from analogfx.modules.sites import required_sites, unwrapped
from analogfx.state import COUNT, X_MAX, X_MIN

__all__ = ["METHODS", "Calibration", "SiteCalibration", "calibrate"]


def calibrate(
    analog: nn.Module,
    batches: Iterable[Any],
    method: str = "quantile",
    *,
    quantile: float = 0.99995,
    max_samples: int = 1000,
    std_alpha: float | None = None,
    adc: bool = False,
    adc_clipped: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Set the input ranges of an analog model from data, and on request the ADCs' bound.

    The model runs over the batches in evaluation, without gradients and with its converters off,
    and every tile of every analog product is shown what it is given: the patches of a
    convolution, zero padding included, the vectors of all groups together. Rows that are zero as
    a whole are left out, and so are values that are not finite, with a warning. Then the ranges
    are set, and closed: training goes on from them and follows the data no more. A tile that saw
    nothing but zeros keeps its range, with a warning. Ranges are of magnitudes: both signs count.

    Mode, parameters, buffers, hooks, configs that were handed in and torch's generators are as
    before; after an exception the ranges are, too. With ``torch.compile`` the model runs as it is
    written.

    Args:
        analog: what ``analogize`` returned, compiled or in a data-parallel wrapper, too. Sites
            without a range, or with a dynamic one, have none to set.
        batches: a DataLoader or any iterable. A batch is a tensor; a tuple or list of positional
            arguments; a dict of keywords; or ``(args, kwargs)``. What forward does not take of a
            tuple or dict (labels) is left out.
        method: what a range becomes:

            * ``"max"``: the largest magnitude.
            * ``"quantile"``: a quantile of the magnitudes of a uniform sample of rows.
            * ``"moving_std"``: the mean over calls of ``std_alpha`` standard deviations.
            * ``"moving_quantile"``: the mean over calls of a quantile. While either mean is
              taken, inputs are clamped to it as it is, so that later layers see what they will.
            * ``"mse"``: the range at which the DAC changes the sample least.
            * ``"entropy"``: the range that loses least of the sample's distribution (KL).

            The first four are those of AIHWKIT-Lightning, whose names for them will do, too.
        quantile: for the methods of that name; 1.0 is the maximum.
        max_samples: rows to keep of each site, on the CPU and in the inputs' dtype.
        std_alpha: for ``"moving_std"``; None takes each config's ``init_std_alpha``.
        adc: read the batches once more and choose one ``forward.out_bound`` for all sites with a
            range: the smallest (to 0.8 %) that clips at most ``adc_clipped`` of their outputs. It
            goes into the model's own configs.
        seed: of the sample.
        progress: show a progress bar.

    Returns:
        Ranges before and after, the share of inputs that they clip, and the ADC's bound.

    Raises:
        CalibrationError: for arguments that cannot be, no batch, a model on the meta device or
            without a range to set, and an iterator, which gives its batches once, with ``adc``.
        TypeError: for a model without an analog layer.

    Source: the first four methods are those of ``calibrate_input_ranges`` in
    aihwkit_lightning/inference/calibration/calibration.py, version 2.1.0.

    Example:
        >>> print(analogfx.calibrate(analog, loader, method="quantile"))
    """
    analog = unwrapped(analog)
    settings = Settings(method, quantile, max_samples, std_alpha)
    if not 0 <= adc_clipped < 1:
        raise CalibrationError(f"adc_clipped = {adc_clipped!r}: expected a share from 0, below 1")
    if adc and isinstance(batches, Iterator):
        raise CalibrationError(
            f"adc=True reads the batches twice, which a {type(batches).__name__} does not allow: "
            "pass a list or a DataLoader"
        )
    named = _names(analog)
    _check(analog, named, adc)

    inputs, outputs = InputPass(settings, seed), OutputPass()
    out_bound: float | None = None
    with _as_it_was(analog), _all_or_nothing(named):
        run = caller(analog)
        with inputs.watching([m for m in named if m._analog.resolved.has_state]):
            count = _feed(run, batches, f"calibrate: {settings.method}", progress)
        before = {key: _ranges(key[0], found.site) for key, found in inputs.sites.items()}
        for (module, _), found in inputs.sites.items():
            _set(module, found.site, found.ranges())
        if adc:
            ranged = [m for m in named if m._analog.resolved.has_range]
            with outputs.watching(ranged):
                _feed(run, batches, "calibrate: ADC", progress)
            out_bound = outputs.bound(adc_clipped)
            _bound(ranged, out_bound)
    _warn(named, inputs)

    rows = []
    for module, names in named.items():
        for index, name in enumerate(names):
            seen, given = inputs.sites.get((module, index)), outputs.sites.get((module, index))
            if seen or given:
                after = _ranges(module, seen.site) if seen else ()
                clipped = tuple(seen.clipped(after)) if seen else ()
                beyond = given.clipped(out_bound) if given and out_bound else None
                row = SiteCalibration(name, before.get((module, index), ()), after, clipped, beyond)
                rows.append(row)
    out_clipped = outputs.total().clipped(out_bound) if out_bound else None
    return Calibration(settings.method, count, tuple(rows), out_bound, out_clipped)


_Names = dict[AnalogModule, list[str]]
"""Every analog module, with the names of its sites."""


def _names(analog: nn.Module) -> _Names:
    named: _Names = {}
    for path, module, site in required_sites(analog):
        several = len(module._analog.sites) > 1
        named.setdefault(module, []).append(site_name(path, site.name, several))
    return named


def _check(analog: nn.Module, named: _Names, adc: bool) -> None:
    """Refuse a model without values, or without anything to set."""
    for name, tensor in (*analog.named_parameters(), *analog.named_buffers()):
        if tensor.is_meta:
            raise CalibrationError(f"{name} is on the meta device, it has no values to run with")
    configs = [module._analog.resolved for module in named]
    if not any(c.has_state or (adc and c.has_range) for c in configs):
        found = ", ".join(sorted({c.range_mode for c in configs}))
        raise CalibrationError(
            f"{type(analog).__name__} has no input range to set (range modes: {found}): its config "
            "needs pre_post.input_range.enable = True, with dynamic = False"
        )


def _feed(run: Callable[[Any], Any], batches: Iterable[Any], title: str, progress: bool) -> int:
    """Run the model over all batches; returns how many there were.

    Raises:
        CalibrationError: there was none.
    """
    count = 0
    for batch in tqdm(batches, desc=title, unit="batch", leave=False, disable=not progress):
        run(batch)
        count += 1
    if not count:
        raise CalibrationError("there was no batch to calibrate from")
    return count


@contextmanager
def _as_it_was(analog: nn.Module) -> Iterator[None]:
    """The model in evaluation, without gradients or compilers; its modes and torch's generators.

    A DataLoader draws from the global generator, too.
    """
    modes = {module: module.training for module in analog.modules()}
    devices = {t.device for t in (*analog.parameters(), *analog.buffers()) if t.is_cuda}
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
        ):
            analog.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _all_or_nothing(named: _Names) -> Iterator[None]:
    """After an exception, the ranges and configs that the modules had before."""
    states = [
        (state, state.detach().clone())
        for module in named
        for name in module._analog.state_names()
        if (state := getattr(module, name, None)) is not None
    ]
    placements = [(p := m._analog, p.config, p.resolved, p.programs) for m in named]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for state, value in states:
                state.copy_(value)
        for placement, config, resolved, programs in placements:
            placement.config, placement.resolved, placement.programs = config, resolved, programs
        raise


def _ranges(module: AnalogModule, site: AnalogSite) -> tuple[float, ...]:
    value: Tensor = getattr(module, site.state.input_range)
    return tuple(value.detach().abs().flatten().tolist())


def _set(module: AnalogModule, site: AnalogSite, ranges: Sequence[float]) -> None:
    """Give tiles their ranges and close them to statistics; NaN and 0 leave a tile as it is."""
    names = site.state
    state: Tensor = getattr(module, names.input_range)
    new = torch.tensor(ranges, dtype=state.dtype, device=state.device).view_as(state)
    known = new.isfinite() & (new > 0)
    closed = getattr(module, names.of(COUNT)).clamp(min=module._analog.resolved.init_from_data)
    # In fast mode the range is the larger of these two.
    for name, value in (
        (names.input_range, new),
        (names.of(COUNT), closed),
        (names.of(X_MIN), -new),
        (names.of(X_MAX), new),
    ):
        state = getattr(module, name)
        state.copy_(torch.where(known, value, state))


def _bound(modules: Iterable[AnalogModule], out_bound: float) -> None:
    """Give the modules' own configs a bound."""
    for module in modules:
        config = TorchInferenceRPUConfig.from_dict(module._analog.config.to_dict())
        config.forward.out_bound = out_bound
        module._analog.change(module, config)


def _warn(named: _Names, inputs: InputPass) -> None:
    """Say which sites saw nothing, and which saw what is no number."""
    silent, broken = [], []
    for (module, index), seen in inputs.sites.items():
        name = named[module][index]
        ranges = seen.ranges()
        tiles = [str(i) for i, r in enumerate(ranges) if not 0 < r < math.inf]
        if tiles:
            part = f" (tiles {', '.join(tiles)})" if len(tiles) < len(ranges) else ""
            silent.append(name + part)
        if seen.non_finite:
            broken.append(f"{name} ({seen.non_finite})")
    if silent:
        warnings.warn(
            f"no data, or nothing but zeros, reached {', '.join(silent)}: ranges stay as they were",
            stacklevel=3,
        )
    if broken:
        warnings.warn(
            f"infinite and NaN inputs were left out of the ranges of {', '.join(broken)}",
            stacklevel=3,
        )
