"""Compile PyTorch models into models for analog in-memory-computing chips."""

from analogfx import versions as versions  # first: it says so where a package is too old

# isort: split

from analogfx import chip, distributed, errors, hardware, recipes
from analogfx.api import analogize, to_digital
from analogfx.audit import audit
from analogfx.backend.explain import explain
from analogfx.backend.state import backend_state
from analogfx.calibration import calibrate
from analogfx.checkpoint import digital_state_dict, load, save
from analogfx.config import (
    ExpertRange,
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
    bits,
)
from analogfx.device import Device, load_device, program
from analogfx.distributed import parameter_groups, prepare_training
from analogfx.evaluation import programmed
from analogfx.lifetime import Lifetime, evaluate
from analogfx.modules.analog_module import AnalogModule
from analogfx.modules.sites import analog_layers, named_analog_layers
from analogfx.onnx import export_onnx, load_onnx_sites
from analogfx.ranges import warn_unset
from analogfx.reconfigure import set_config
from analogfx.report import report
from analogfx.search.plan import plan
from analogfx.search.sensitivity import sensitivity
from analogfx.tiles.cost import cost
from analogfx.tiles.export import export_tiles
from analogfx.tiles.tile_map import tile_map
from analogfx.trace import trace
from analogfx.training import clip_after_step, clip_weights, quantize_weights, weights_written

__version__ = "0.1.0"

__all__ = [
    "AnalogModule",
    "Device",
    "ExpertRange",
    "IOParameters",
    "InputRangeParameter",
    "Lifetime",
    "MappingParameter",
    "PrePostProcessingParameter",
    "TorchInferenceRPUConfig",
    "WeightClipParameter",
    "WeightClipType",
    "WeightModifierParameter",
    "WeightModifierType",
    "WeightNoiseInjectionType",
    "WeightQuantizationType",
    "analog_layers",
    "analogize",
    "audit",
    "backend_state",
    "bits",
    "calibrate",
    "chip",
    "clip_after_step",
    "clip_weights",
    "cost",
    "digital_state_dict",
    "distributed",
    "errors",
    "evaluate",
    "explain",
    "export_onnx",
    "export_tiles",
    "hardware",
    "load",
    "load_device",
    "load_onnx_sites",
    "named_analog_layers",
    "parameter_groups",
    "plan",
    "prepare_training",
    "program",
    "programmed",
    "quantize_weights",
    "recipes",
    "report",
    "save",
    "sensitivity",
    "set_config",
    "tile_map",
    "to_digital",
    "trace",
    "warn_unset",
    "weights_written",
]
