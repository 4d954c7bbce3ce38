"""Lightning's optimizer and calibration, by ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from torch import nn
from torch.optim import Optimizer

from analogfx.calibration import Calibration, calibrate
from analogfx.errors import CalibrationError
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import required_sites
from analogfx.reconfigure import set_config
from analogfx.training import clip_weights


def AnalogOptimizer(
    optimizer_cls: type[Optimizer],
    analog_layers: Callable[[], Iterable[AnalogModule]],
    *args: Any,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer that clips analog weights after every step.

    ``analogfx.clip_after_step`` does the same to an optimizer that there is.

    Args:
        optimizer_cls: a class of torch's or of the same kind.
        analog_layers: called after every step, ``model.analog_layers`` for example.
        args, kwargs: those of ``optimizer_cls``.

    Returns:
        An object of ``optimizer_cls`` itself.

    Example:
        >>> AnalogOptimizer(AdamW, model.analog_layers, model.parameters(), lr=1e-3)
    """
    optimizer = optimizer_cls(*args, **kwargs)
    # All layers at once, so that a weight that several share is clipped once.
    optimizer.register_step_post_hook(lambda *_: clip_weights(nn.ModuleList(analog_layers())))
    return optimizer


class InputRangeCalibrationType(Enum):
    """Lightning's methods of calibration."""

    NONE = "None"
    MOVING_STD = "MovingStd"
    MOVING_QUANTILE = "MovingQuantile"
    CACHE_QUANTILE = "CacheQuantile"
    MAX = "Max"


def calibrate_input_ranges(
    model: nn.Module,
    calibration_type: InputRangeCalibrationType,
    dataloader: Iterable[Any],
    quantile: float = 0.99995,
    max_samples: int = 1000,
    std_alpha: float | None = None,
    verbose: bool = True,
) -> Calibration:
    """Set input ranges from data, see :func:`analogfx.calibrate`.

    A layer without an input range gets one, learned, as in Lightning. Unlike there, a model may
    have ranges and a DAC already, and may be in training.

    Args:
        model: analog.
        calibration_type: the method.
        dataloader: yields ``(args, kwargs)``, or any batch that ``analogfx.calibrate`` takes.
        quantile: for the methods of that name.
        max_samples: rows to keep of each layer.
        std_alpha: for ``MOVING_STD``; None takes each config's ``init_std_alpha``.
        verbose: show a progress bar.

    Raises:
        CalibrationError: ``calibration_type`` is NONE, and as in ``analogfx.calibrate``.
    """
    if calibration_type is InputRangeCalibrationType.NONE:
        raise CalibrationError("calibration_type = NONE: expected a method")
    layers = {path: layer for path, layer, _ in required_sites(model)}
    wanted = {path: layer.rpu_config for path, layer in layers.items()}
    for config in wanted.values():
        config.pre_post.input_range.enable = True
        config.pre_post.input_range.dynamic = False
    set_config(model, lambda path, _: wanted.get(path))
    return calibrate(
        model,
        dataloader,
        method=calibration_type.value,
        quantile=quantile,
        max_samples=max_samples,
        std_alpha=std_alpha,
        progress=verbose,
    )
