"""What a run of the demo does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a run does. Equal settings give equal results on one machine."""

    seed: int = 0
    """Of the data split, the initial weights, the batches and all noise."""
    epochs: int = 30
    """Epochs of each of the three trainings: the common start and the two ways on from it."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    test_share: float = 0.3
    """Share of the images that is held out, the same for every digit."""
    training_noise: float = 0.15
    """Noise on the weights in hardware-aware training, relative to the channel's largest."""
    strengths: tuple[float, ...] = (0.0, 0.03, 0.06, 0.12, 0.24)
    """Programming noise of the evaluation, in the same unit."""
    times: tuple[float, ...] = (1.0, 3600.0, 86400.0, 2_592_000.0, 31_536_000.0, 315_360_000.0)
    """Seconds after programming: a second, an hour, a day, a month, a year, ten years."""
    draws: int = 25
    """How many chips an analog model is programmed to, at each strength and for the lifetime."""


def quick(seed: int = 0, epochs: int = 12) -> Settings:
    """Return settings for a rough result in a few seconds."""
    return Settings(seed=seed, epochs=epochs, draws=5)
