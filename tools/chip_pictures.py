"""Draws the page on chips its picture: ``python tools/chip_pictures.py``.

Spread and mean of a single device against its target conductance, for every noise model.
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from analogfx import chip

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "chip-models.png"
TIMES = {"1 second": 1.0, "1 day": 86400.0, "1 year": 31_536_000.0}
DEVICES = 20_000
POINTS = 25
MODELS = {
    "PCM": chip.PCMLikeNoiseModel(),
    "Hermes, 2 devices": chip.HermesNoiseModel(),
    "state-independent": chip.StateIndependentNoiseModel(),
    "ReRAM, Wan 2022": chip.ReRamWan2022NoiseModel(),
    "ReRAM, CMO": chip.ReRamCMONoiseModel(),
    "foundation models": chip.FoundationNoiseModel(),
}


def measured(model: chip.NoiseModel, time: float) -> tuple[torch.Tensor, ...]:
    """Targets, and the mean and deviation of devices that were programmed to them, (POINTS,)."""
    generator = torch.Generator().manual_seed(0)

    def draw(like: torch.Tensor, name: str = "") -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    converter = model.g_converter
    low = max(getattr(converter, "g_min", 0.0), 0.0)
    targets = torch.linspace(low, converter.g_max, POINTS)
    devices = targets.repeat_interleave(DEVICES).unsqueeze(0)
    programmed = model.programmed(devices, draw)
    found = model.at(programmed, model.drift(devices, draw), time, draw).view(POINTS, DEVICES)
    return targets, found.mean(1), found.std(1)


def main() -> None:
    """Draw the picture."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(11, 7), layout="constrained")
    rows = figure.subplots(2, len(MODELS) // 2, squeeze=False).flat
    for axes, (name, model) in zip(rows, MODELS.items(), strict=True):
        for label, time in TIMES.items():
            targets, mean, std = measured(model, time)
            (line,) = axes.plot(targets, mean - targets, label=f"mean, {label}")
            low, high = mean - targets - std, mean - targets + std
            axes.fill_between(targets, low, high, alpha=0.15, color=line.get_color())
        axes.axhline(0, color="gray", lw=0.8, ls="--")
        axes.set_title(name)
        axes.set_xlabel("target, µS")
        axes.set_ylabel("found − target, µS")
    figure.axes[0].legend(frameon=False, fontsize="small")
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
