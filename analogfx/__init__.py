"""Compile PyTorch models into models for analog in-memory-computing chips."""

from analogfx import chip, distributed, errors, recipes
from analogfx.api import analogize, to_digital
from analogfx.backend.explain import explain
from analogfx.backend.state import backend_state
from analogfx.calibration import calibrate
from analogfx.checkpoint import digital_state_dict, load, save
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
    bits,
)
from analogfx.device import Device, load_device, program
from analogfx.distributed import parameter_groups, prepare_training
from analogfx.evaluation import programmed
from analogfx.lifetime import Lifetime, evaluate
from analogfx.onnx import export_onnx, load_onnx_sites
from analogfx.report import report
from analogfx.trace import trace
from analogfx.training import clip_after_step, clip_weights, quantize_weights, weights_written
from analogfx.unset import warn_unset

__version__ = "0.1.0"

__all__ = [
    "Device",
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
    "analogize",
    "backend_state",
    "bits",
    "calibrate",
    "chip",
    "clip_after_step",
    "clip_weights",
    "digital_state_dict",
    "distributed",
    "errors",
    "evaluate",
    "explain",
    "export_onnx",
    "load",
    "load_device",
    "load_onnx_sites",
    "parameter_groups",
    "prepare_training",
    "program",
    "programmed",
    "quantize_weights",
    "recipes",
    "report",
    "save",
    "to_digital",
    "trace",
    "warn_unset",
    "weights_written",
]
