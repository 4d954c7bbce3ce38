"""AIHWKIT-Lightning's checkpoints, and its names for scripts that import them.

Change ``from aihwkit_lightning... import`` to ``from analogfx.compat.lightning import``; what each
name does is on the page "From AIHWKIT-Lightning or AIHWKIT" of the docs.
"""

from analogfx.compat.lightning.checkpoint import configs, load, save, state_dict
from analogfx.compat.lightning.convert import (
    convert_to_analog,
    convert_to_digital,
    export_to_aihwkit,
)
from analogfx.compat.lightning.layers import (
    AnalogConv1d,
    AnalogConv2d,
    AnalogConv3d,
    AnalogGRUCell,
    AnalogLayerBase,
    AnalogLinear,
    AnalogLSTMCell,
    AnalogRNN,
    AnalogSequential,
    AnalogVanillaRNNCell,
    AnalogWrapper,
)
from analogfx.compat.lightning.train import (
    AnalogOptimizer,
    InputRangeCalibrationType,
    calibrate_input_ranges,
)
from analogfx.config import (
    InputRangeParameter,
    IOParameters,
    MappingParameter,
    PrePostProcessingParameter,
    TorchInferenceRPUConfig,
    WeightClipParameter,
    WeightClipType,
    WeightModifierParameter,
    WeightModifierType,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)

__all__ = [
    "AnalogConv1d",
    "AnalogConv2d",
    "AnalogConv3d",
    "AnalogGRUCell",
    "AnalogLSTMCell",
    "AnalogLayerBase",
    "AnalogLinear",
    "AnalogOptimizer",
    "AnalogRNN",
    "AnalogSequential",
    "AnalogVanillaRNNCell",
    "AnalogWrapper",
    "IOParameters",
    "InputRangeCalibrationType",
    "InputRangeParameter",
    "MappingParameter",
    "PrePostProcessingParameter",
    "TorchInferenceRPUConfig",
    "WeightClipParameter",
    "WeightClipType",
    "WeightModifierParameter",
    "WeightModifierType",
    "WeightNoiseInjectionType",
    "WeightQuantizationType",
    "calibrate_input_ranges",
    "configs",
    "convert_to_analog",
    "convert_to_digital",
    "export_to_aihwkit",
    "load",
    "save",
    "state_dict",
]
