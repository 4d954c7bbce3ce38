"""What a chip does to weights: devices, how weights become conductances, what compensates drift.

Nothing here knows of modules or tiles: formulas on tensors of conductances, in microsiemens, and
seconds after programming. Random numbers are handed in.
"""

from analogfx.chip.additive import AdditiveNoiseModel
from analogfx.chip.compensation import (
    BaseDriftCompensation,
    GlobalDriftCompensation,
    GlobalDriftCompensationWithExactReference,
    PerColumnDriftCompensation,
)
from analogfx.chip.converters import (
    ConductanceConverter,
    CustomPairConductanceConverter,
    DualPairConductanceConverter,
    NPairConductanceConverter,
    SignedConductanceConverter,
    SingleDeviceConductanceConverter,
    SinglePairConductanceConverter,
)
from analogfx.chip.custom_drift import CustomDriftPCMLikeNoiseModel
from analogfx.chip.foundation import FoundationNoiseModel
from analogfx.chip.hermes import HermesNoiseModel
from analogfx.chip.model import Draw, NoiseModel
from analogfx.chip.pcm import PCMLikeNoiseModel
from analogfx.chip.reram_cmo import ReRamCMONoiseModel
from analogfx.chip.reram_wan import ReRamWan2022NoiseModel
from analogfx.chip.state_independent import StateIndependentNoiseModel
from analogfx.chip.stuck import StuckAtNoiseModel

__all__ = [
    "AdditiveNoiseModel",
    "BaseDriftCompensation",
    "ConductanceConverter",
    "CustomDriftPCMLikeNoiseModel",
    "CustomPairConductanceConverter",
    "Draw",
    "DualPairConductanceConverter",
    "FoundationNoiseModel",
    "GlobalDriftCompensation",
    "GlobalDriftCompensationWithExactReference",
    "HermesNoiseModel",
    "NPairConductanceConverter",
    "NoiseModel",
    "PCMLikeNoiseModel",
    "PerColumnDriftCompensation",
    "ReRamCMONoiseModel",
    "ReRamWan2022NoiseModel",
    "SignedConductanceConverter",
    "SingleDeviceConductanceConverter",
    "SinglePairConductanceConverter",
    "StateIndependentNoiseModel",
    "StuckAtNoiseModel",
]
