"""``from_pretrained`` of analog models, and of digital ones that are to be analog."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from analogfx.api import analogize
from analogfx.config import TorchInferenceRPUConfig
from analogfx.errors import CheckpointError, PlacementError, shown
from analogfx.hf.config import METHOD, AnalogConfig, became_analog
from analogfx.hf.tensor_parallel import follow_plan
from analogfx.manifest import Manifest
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import sites
from analogfx.state import VARIABLES


@register_quantizer(METHOD)
class AnalogQuantizer(HfQuantizer):
    """Makes a model analog before its weights are loaded, and completes what no file gave.

    The model that comes out is what :func:`analogfx.analogize` gives: in transformers' sense it is
    not quantized, so that Trainer, ``half()`` and ``generate()`` take it as any other.
    """

    quantization_config: AnalogConfig
    requires_calibration = False

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether Trainer trains it."""
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse what cannot be done.

        Raises:
            PlacementError: a digital model is to be analog and on the disk at once.
        """
        places = device_map.values() if isinstance(device_map, dict) else ()
        if not self.pre_quantized and "disk" in places:
            raise PlacementError(
                "device_map offloads to the disk, where the files have no input ranges: load the "
                "model without, call save_pretrained(), and load the analog folder with it"
            )

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        if self.pre_quantized:
            _analogize_as_stored(model, self.quantization_config.manifest())
        else:
            its = self.quantization_config
            analogize(model, its.rpu_config, inplace=True, passes=its.passes)
            names = sorted({n for m in _analog(model) for n in m._analog.state_names()})
            self._expected = model._keys_to_ignore_on_load_missing
            # A digital folder has none of these, which nobody needs to be told.
            model._keys_to_ignore_on_load_missing = [
                *(self._expected or ()),
                *(rf"(^|\.){re.escape(name)}$" for name in names),
            ]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if not self.pre_quantized:
            model._keys_to_ignore_on_load_missing = self._expected
        for path, module, site in sites(model):
            for variable in VARIABLES:
                self._complete(path, module, site.state.of(variable), variable)
        follow_plan(model)
        self.remove_quantization_config(model)
        for inner in model.modules():  # some models compute otherwise where they find it
            if isinstance(inner, PreTrainedModel):
                inner.config.__dict__.pop("_is_quantized", None)
        became_analog(model)

    def _complete(self, path: str, module: AnalogModule, name: str, variable: Any) -> None:
        """Finish one variable of a site after loading.

        Raises:
            CheckpointError: no file has it.
        """
        state = getattr(module, name, None)
        if state is None:
            return
        if not getattr(state, "_is_hf_initialized", False) and not state.is_meta:
            if self.pre_quantized:
                raise CheckpointError(f"the folder lacks {shown(f'{path}.{name}')}")
            module._reset({name})
        if variable.trained is not None:  # transformers lets every parameter train
            state.requires_grad_(variable.trained(module._analog.resolved))


def _analog(model: nn.Module) -> list[AnalogModule]:
    return [module for module in model.modules() if isinstance(module, AnalogModule)]


def _analogize_as_stored(model: Any, manifest: Manifest) -> None:
    """Make analog what a file says.

    Raises:
        CheckpointError: it is of another model, or was made with passes.
    """
    if manifest.passes:
        raise CheckpointError(
            f"the model was made with the passes {shown(manifest.passes)}, which from_pretrained() "
            "cannot be given: write it by analogfx.save() and read it by analogfx.load()"
        )
    chosen = _fitted(model, manifest)
    analogize(model, lambda name, _: chosen.get(name), inplace=True)
    for name, module in model.named_modules():
        if name in chosen and not isinstance(module, AnalogModule):
            raise CheckpointError(f"{name!r} of {type(model).__name__} does not become analog")


def _fitted(model: Any, manifest: Manifest) -> dict[str, TorchInferenceRPUConfig]:
    """The stored configs by the model's own names.

    As of weights, a model may have another head than the one that was saved, or none.

    Raises:
        CheckpointError: the model lacks a module of the saved one's body.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    stored = manifest.configs
    has_head = any(path.startswith(prefix) for path in stored)
    fitted = {}
    for path, config in stored.items():
        spelled = (path, path.removeprefix(prefix), prefix + path)
        name = next((name for name in spelled if name in names), None)
        if name is not None:
            fitted[name] = config
        elif path.startswith(prefix) or not has_head:  # of a head transformers says it itself
            raise CheckpointError(
                f"the folder was made for a model with the module {shown(path)}, which "
                f"{type(model).__name__} has not"
            )
    return fitted
