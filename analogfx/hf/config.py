"""The entry ``quantization_config`` of an analog model's ``config.json``."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from analogfx.errors import CheckpointError, abridged, shown
from analogfx.manifest import Manifest, manifest_of, read_manifest
from analogfx.modules.analog_module import AnalogModule
from analogfx.passes.pipeline import Pass

METHOD = "analogfx.hf"
"""The entry's ``quant_method``. transformers names it where it does not know it: that is the module
to import."""
SCHEMA = 1


@register_quantization_config(METHOD)
class AnalogConfig(QuantizationConfigMixin):
    """What of a model is analog, for ``from_pretrained`` and ``config.json``.

    Args:
        rpu_config: what :func:`analogfx.analogize` takes: a config, a mapping from module names,
            or a callable.
        passes: passes of your own, see :func:`analogfx.analogize`.

    Example:
        >>> config = analogfx.hf.AnalogConfig(analogfx.recipes.afm())
        >>> AutoModelForCausalLM.from_pretrained("digital", quantization_config=config)
    """

    def __init__(self, rpu_config: Any, passes: Sequence[Pass] = ()) -> None:
        self.quant_method = METHOD
        self.rpu_config = rpu_config
        self.passes = tuple(passes)
        self._stored: dict[str, Any] | None = None
        """What a file says."""
        self._model: weakref.ref[nn.Module] | None = None
        """The model whose config it is part of: what it says follows the model."""

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read what :meth:`to_dict` gave. It is checked when a model is made of it."""
        made = cls(None)
        made._stored = dict(config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    @classmethod
    def of(cls, model: nn.Module) -> AnalogConfig:
        """The config of a model that is analog already; the model is not kept alive."""
        made = cls(None)
        made._model = weakref.ref(model)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the config of every analog module as the model is now."""
        model = self._model() if self._model is not None else None
        if model is not None:
            return {"quant_method": METHOD, "schema": SCHEMA, **manifest_of(model)}
        return {"quant_method": METHOD, **(self._stored or {})}

    def manifest(self) -> Manifest:
        """What a file says, checked.

        Raises:
            CheckpointError: it is damaged or of another schema.
        """
        stored = self.to_dict()
        if stored.get("schema") != SCHEMA or isinstance(stored["schema"], bool):
            raise CheckpointError(
                f"quantization_config of config.json has schema {shown(stored.get('schema'))}; "
                f"this version reads {SCHEMA}"
            )
        try:
            return read_manifest(stored)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(
                f"quantization_config of config.json is damaged: {abridged(str(found))}"
            ) from error

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2)}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the model: what is said of it now."""
        return self.__dict__ | {"_model": None, "_stored": self.to_dict()}

    def __deepcopy__(self, memo: dict[int, Any]) -> AnalogConfig:
        """A copy with a model follows the model's copy; one by itself stays as it is."""
        model = self._model() if self._model is not None else None
        if model is not None and id(model) in memo:
            return AnalogConfig.of(memo[id(model)])
        twin = AnalogConfig(self.rpu_config, self.passes)
        twin._stored = self._stored if model is None else self.to_dict()
        return twin


def became_analog(model: nn.Module) -> None:
    """Let the configs of the models of transformers in a model say what is analog in them."""
    for inner in _outermost(model):
        if not any(isinstance(module, AnalogModule) for module in inner.modules()):
            continue
        found = getattr(inner.config, "quantization_config", None)
        if found is None or isinstance(found, AnalogConfig):
            inner.config.quantization_config = AnalogConfig.of(inner)
        else:
            method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
            warnings.warn(
                f"{type(inner).__name__} is quantized by {getattr(method, 'value', method)}: what "
                "save_pretrained() writes will not say that it is analog, too; use analogfx.save()",
                stacklevel=4,
            )


def became_digital(model: nn.Module) -> None:
    """Let the configs of the models of transformers in a model say nothing."""
    for inner in _outermost(model):
        if isinstance(getattr(inner.config, "quantization_config", None), AnalogConfig):
            del inner.config.quantization_config


def _outermost(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The models of transformers in a model that are inside no other one."""
    if isinstance(model, PreTrainedModel):
        yield model
    else:
        for child in model.children():
            yield from _outermost(child)
