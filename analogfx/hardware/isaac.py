"""ISAAC, an accelerator of memristor crossbars (a design in 32 nm, not a chip that was made).

Source: Shafiee et al., "ISAAC: A Convolutional Neural Network Accelerator with In-Situ Analog
Arithmetic in Crossbars", ISCA 2016, doi 10.1109/ISCA.2016.12: Table I gives power and area of every
part of a tile, of 12 units of 8 crossbars each. A unit reads its crossbars once in 100 ns. Energies
are powers divided by these rates.
"""

from __future__ import annotations

from analogfx.hardware.description import Hardware

_CYCLE_NS = 100.0
_CROSSBARS, _UNITS, _ROWS, _COLUMNS, _PHASES = 8, 12, 128, 128, 16
# Milliwatts of Table I: of a unit, and of a tile. The router serves four tiles.
_ADC, _DAC, _ARRAYS, _SHIFT_ADD, _INPUT_REGISTER, _OUTPUT_REGISTER = 16.0, 4.0, 2.4, 0.2, 1.24, 0.23
_EDRAM, _BUS, _ROUTER, _TILE_REGISTER = 20.7, 7.0, 42.0 / 4, 1.68
_TILE_MM2 = 0.372

_moving_mw = _INPUT_REGISTER + _OUTPUT_REGISTER
_moving_mw += (_EDRAM + _BUS + _ROUTER + _TILE_REGISTER) / _UNITS
_unit_bytes = 2 * (_CROSSBARS * _ROWS + _COLUMNS)
"""Of all phases: 16-bit inputs of every crossbar, 16-bit outputs of the unit."""

ISAAC = Hardware(
    name="ISAAC-CE",
    crossbar_rows=_ROWS,
    crossbar_columns=_COLUMNS,
    phases=_PHASES,
    read_energy_pj=_ARRAYS * _CYCLE_NS / _CROSSBARS,
    cell_energy_pj=0.0,
    dac_energy_pj=_DAC * _CYCLE_NS / (_CROSSBARS * _ROWS),
    adc_energy_pj=_ADC * _CYCLE_NS / (_CROSSBARS * _COLUMNS),
    digital_op_energy_pj=_SHIFT_ADD * _CYCLE_NS / (_CROSSBARS * _COLUMNS),
    byte_energy_pj=_moving_mw * _CYCLE_NS * _PHASES / _unit_bytes,
    input_bytes=2.0,
    output_bytes=2.0,
    read_time_ns=_CYCLE_NS,
    adc_time_ns=_CYCLE_NS / _COLUMNS,
    adcs_per_crossbar=1,
    crossbar_area_mm2=_TILE_MM2 / (_UNITS * _CROSSBARS),
    sources={
        "crossbar_rows": "Table I: 8 arrays of 128x128 in a unit",
        "crossbar_columns": "Table I",
        "phases": "Section III: 16-bit inputs through 1-bit DACs",
        "read_energy_pj": "Table I: memristor arrays 2.4 mW for 8, times 100 ns",
        "cell_energy_pj": "in read_energy_pj",
        "dac_energy_pj": "Table I: 8x128 DACs 4 mW, times 100 ns",
        "adc_energy_pj": "Table I: 8 ADCs 16 mW, times 100 ns, for 8x128 columns",
        "digital_op_energy_pj": "Table I: shift-and-add 0.2 mW, times 100 ns, for 8x128 results",
        "byte_energy_pj": "Table I: registers 1.24, 0.23 and 1.68/12 mW, eDRAM 20.7/12, bus 7/12, "
        "router 42/48, times 1.6 us, for 2304 bytes",
        "input_bytes": "Section III: 16 bits",
        "output_bytes": "Section III: 16 bits",
        "read_time_ns": "Section III: a crossbar read takes 100 ns",
        "adc_time_ns": "Section VI: 1.28 giga-samples a second",
        "adcs_per_crossbar": "Table I: 8 ADCs for 8 arrays",
        "crossbar_area_mm2": "Table I: a tile 0.372 mm2, of 96 arrays",
    },
)
"""Weights of 16 bits on 8 cells: map with ``crossbar=(128, 128), differential=False, slices=8``."""
