"""The ``tp_plan`` of transformers, on analog layers.

transformers cuts weights as torch's ``parallelize_module`` does, but puts a forward of its own on
the instance, which knows nothing of tiles, and cuts ranges as if they were biases. Analog layers
get torch's hooks instead, for the same layouts.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from analogfx.errors import PlacementError
from analogfx.modules.sites import analog_modules


def follow_plan(model: Any) -> None:
    """Let analog layers that transformers has cut run as ``parallelize_module`` runs them.

    Raises:
        PlacementError: a layer cannot be cut so.
    """
    for path, module in analog_modules(model):
        if getattr(module, "_is_hooked", False) and "forward" in module.__dict__:
            _apply(path, module, model.tp_plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path)))


def _apply(path: str, module: nn.Module, plan: str | None) -> None:
    from torch.distributed.tensor import parallel
    from transformers.integrations import ALL_PARALLEL_STYLES

    theirs: Any = ALL_PARALLEL_STYLES[plan] if plan is not None else None
    name = type(theirs).__name__
    if name not in ("ColwiseParallel", "RowwiseParallel"):
        raise PlacementError(
            f"{path}: tp_plan cuts this analog layer by {plan!r}, which no analog layer can be cut "
            "by: give it a rule of 'colwise' or 'rowwise', or no config"
        )
    style = getattr(parallel, name)(
        input_layouts=theirs.input_layouts,
        output_layouts=theirs.output_layouts,
        use_local_output=theirs.use_local_output,
    )
    module.__dict__.pop("forward")
    weights = {name: p for name, p in module._parameters.items() if name in ("weight", "bias")}
    style._apply(module, module._parameters["weight"].device_mesh)  # type: ignore[union-attr]
    module._parameters.update(weights)  # which may be tied to others
