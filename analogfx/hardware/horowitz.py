"""Digital arithmetic in 45 nm at 0.9 V.

Source: Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, doi
10.1109/ISSCC.2014.6757323: additions of 8, 32 bits 0.03, 0.1 pJ; multiplication of 8 bits 0.2 pJ;
in floating point of 32 bits 0.9 and 3.7 pJ. Fetching operands costs more than either (10 pJ for 64
bits of an 8 KB cache), and is not counted: a digital processor takes more than this.
"""

from __future__ import annotations

from analogfx.hardware.description import DigitalReference

HOROWITZ_INT8 = DigitalReference(
    "8-bit integers, 45 nm", 0.2 + 0.1, "8-bit multiplication 0.2 pJ, 32-bit addition 0.1 pJ"
)
HOROWITZ_FP32 = DigitalReference(
    "float32, 45 nm", 3.7 + 0.9, "multiplication 3.7 pJ, addition 0.9 pJ"
)
