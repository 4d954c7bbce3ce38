"""The 64-core chip of phase-change memory that IBM made in 14 nm, in its two modes of reading.

Source: Le Gallo et al., "A 64-core mixed-signal in-memory compute chip based on phase-change memory
for deep neural network inference", Nature Electronics 6 (2023), doi 10.1038/s41928-023-01010-1: for
8-bit inputs and outputs at most 63.1 TOPS at 9.76 TOPS/W (one phase) and 16.1 TOPS at 2.48 TOPS/W
(four phases) with 64 cores of 256x256. Converters are in these numbers; what it takes to move data
and to add partial results is not published with them, and absent.
"""

from __future__ import annotations

from analogfx.hardware.description import Hardware

_CORES, _SIZE = 64, 256
_OPERATIONS = 2 * _SIZE * _SIZE


def _mode(phases: str, tops: float, tops_per_watt: float) -> Hardware:
    measured = f"abstract, {phases}: {tops} TOPS of 64 cores at {tops_per_watt} TOPS/W"
    return Hardware(
        name=f"HERMES, {phases}",
        crossbar_rows=_SIZE,
        crossbar_columns=_SIZE,
        read_energy_pj=_OPERATIONS / tops_per_watt,
        cell_energy_pj=0.0,
        dac_energy_pj=0.0,
        adc_energy_pj=0.0,
        read_time_ns=_CORES * _OPERATIONS / tops / 1e3,
        adc_time_ns=0.0,
        sources={
            "crossbar_rows": "64 cores of 256x256 unit cells",
            "crossbar_columns": "64 cores of 256x256 unit cells",
            "read_energy_pj": f"{measured}; one read is 2 x 256 x 256 operations",
            "cell_energy_pj": "in read_energy_pj",
            "dac_energy_pj": "in read_energy_pj",
            "adc_energy_pj": "in read_energy_pj",
            "read_time_ns": measured,
            "adc_time_ns": "in read_time_ns: an ADC for every column",
        },
    )


HERMES_ONE_PHASE = _mode("one phase", 63.1, 9.76)
"""Fast and less precise."""
HERMES_FOUR_PHASE = _mode("four phases", 16.1, 2.48)
"""Slow and precise. All four phases are one read here."""
