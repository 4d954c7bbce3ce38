"""Descriptions of chips for :func:`analogfx.cost`: your own, and published ones."""

from analogfx.hardware.description import DigitalReference, Hardware
from analogfx.hardware.hermes import HERMES_FOUR_PHASE, HERMES_ONE_PHASE
from analogfx.hardware.horowitz import HOROWITZ_FP32, HOROWITZ_INT8
from analogfx.hardware.isaac import ISAAC

PRESETS = {
    "isaac": ISAAC,
    "hermes-one-phase": HERMES_ONE_PHASE,
    "hermes-four-phase": HERMES_FOUR_PHASE,
}
"""By the names that the command line takes."""

__all__ = [
    "HERMES_FOUR_PHASE",
    "HERMES_ONE_PHASE",
    "HOROWITZ_FP32",
    "HOROWITZ_INT8",
    "ISAAC",
    "PRESETS",
    "DigitalReference",
    "Hardware",
]
