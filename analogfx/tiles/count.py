"""How many vectors every site multiplies in one forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from analogfx.calibration.batches import caller
from analogfx.calibration.observe import inputs, watching
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import sites


def input_vectors(analog: nn.Module, batch: Any) -> Counter[tuple[AnalogModule, int]]:
    """Vectors that each site is given, by module and number of the site; 0 if it is not called.

    A convolution multiplies once at every position. A module that is called twice counts twice.

    Args:
        batch: what a forward takes; see :func:`analogfx.calibrate`.
    """
    seen: Counter[tuple[AnalogModule, int]] = Counter()

    def observer(module: AnalogModule, index: int) -> Any:
        site = module._analog.sites[index]
        width = sum(site.in_sizes) * site.groups

        def count(rows: Tensor) -> Tensor:
            seen[module, index] += rows.numel() // width
            return rows

        return count

    modules = {module: None for _, module, _ in sites(analog)}
    watched = watching(modules, inputs, observer, lambda config: config)
    with evaluating(analog), torch.no_grad(), watched:
        caller(analog)(batch)
    return seen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in eval mode; then every module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
