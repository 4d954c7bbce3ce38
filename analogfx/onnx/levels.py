"""How much of a site's structure a file shows. Imports nothing, so that a shell starts quickly."""

LEVELS: dict[str, frozenset[str]] = {
    "fused": frozenset({"AnalogLinear", "AnalogConv"}),
    "explicit": frozenset({"DAC", "ADC", "DynamicRange"}),
    "standard": frozenset(),
    "qdq": frozenset(),
}
"""The ops of domain ai.analogfx that each level keeps; the rest is written out."""
