"""What a state dict says beside its tensors of the config that they were made with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from analogfx.config import TorchInferenceRPUConfig, as_config, differences
from analogfx.errors import ConfigError, abridged, shown

CONFIG = "analogfx_config"
"""Key of a module's config in the ``_metadata`` of a state dict: plain data, see ``to_dict``."""
LIGHTNING_CONFIG = "rpu_config"
"""The same as AIHWKIT-Lightning writes it, an object of its own class."""

_OF_A_CHIP = ("noise_model", "drift_compensation")
"""Parts of a config that a state dict does not depend on: they act on a programmed chip alone."""


def warn_of_another_config(metadata: Any, own: TorchInferenceRPUConfig) -> None:
    """Warn if a state dict was made with another config than that of the module that loads it.

    Args:
        metadata: what the state dict has of the module.
    """
    if not isinstance(metadata, Mapping):
        return
    found = metadata.get(CONFIG, metadata.get(LIGHTNING_CONFIG))
    if found is None:
        return
    try:
        there = as_config(found, warn=False)
    except ConfigError as error:
        warnings.warn(
            f"the state dict has a config that analogfx cannot read: {error}. The layer keeps its "
            "own config",
            stacklevel=2,
        )
        return
    differ = [
        f"{field} = {shown(theirs)} in the state dict, {shown(ours)} in the model"
        for field, theirs, ours in differences(there, own)
        if not field.startswith(_OF_A_CHIP)
    ]
    if differ:
        # Without the layer's name, so that a model of many layers warns once.
        warnings.warn(
            f"the state dict was made with another config: {abridged('; '.join(differ))}. The "
            "model keeps its own config; analogfx.set_config() changes it",
            stacklevel=2,
        )
