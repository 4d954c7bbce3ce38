"""The demo's two pictures; both need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from analogfx.lifetime import named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AWARE, MAPPED = ("#0072B2", "o"), ("#D55E00", "s")
"""Colour and marker of each model."""


def accuracy_against_noise(summary: dict[str, Any], path: Path) -> None:
    """Draw accuracy against programming noise: means, and bands of one standard deviation."""
    from matplotlib.ticker import PercentFormatter

    rows = summary["noise"]
    strengths = [row["std_dev"] for row in rows]
    figure, axes = _frame(summary, "Handwritten digits on an 8-bit analog chip")
    for name, label, (color, marker) in (
        ("hardware_aware", "analog, trained hardware-aware", AWARE),
        ("mapped", "analog, mapped as it is", MAPPED),
    ):
        mean = [row[name]["mean"] for row in rows]
        low = [row[name]["mean"] - row[name]["std"] for row in rows]
        high = [min(row[name]["mean"] + row[name]["std"], 1.0) for row in rows]
        axes.fill_between(strengths, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(strengths, mean, color=color, marker=marker, markersize=5, label=label)
    axes.set_xlabel("programming noise σ, relative to the channel's largest weight")
    axes.set_ylabel(f"test accuracy, mean ± σ of {summary['settings']['draws']} draws")
    axes.set_xticks(strengths)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    _save(figure, axes, path)


def accuracy_over_time(summary: dict[str, Any], path: Path) -> None:
    """Draw accuracy against the age of a chip: means, and bands from 5 % to 95 % of chips."""
    rows = summary["lifetime"]
    times = [max(row["seconds"], 1.0) for row in rows]
    figure, axes = _frame(summary, "Handwritten digits on chips of phase-change memory")
    for name, label, (color, marker), line in (
        ("hardware_aware_compensated", "trained hardware-aware, drift compensated", AWARE, "-"),
        ("hardware_aware", "trained hardware-aware", AWARE, ":"),
        ("mapped_compensated", "mapped as it is, drift compensated", MAPPED, "-"),
        ("mapped", "mapped as it is", MAPPED, ":"),
    ):
        mean, low, high = ([row[name][key] for row in rows] for key in ("mean", "low", "high"))
        axes.fill_between(times, low, high, color=color, alpha=0.14, linewidth=0)
        axes.plot(times, mean, line, color=color, marker=marker, markersize=5, label=label)
    axes.set_xscale("log")
    axes.set_xticks(times, [named(row["seconds"]) for row in rows])
    axes.minorticks_off()
    axes.set_xlabel("time after programming")
    axes.set_ylabel(f"test accuracy, mean and 5–95 % of {summary['settings']['draws']} chips")
    _save(figure, axes, path)


def _frame(summary: dict[str, Any], title: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    axes.axhline(summary["digital"], color="0.35", linestyle="--", linewidth=1.2, label="digital")
    axes.set_title(title, loc="left", fontsize=11)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", framealpha=1, edgecolor="none", fontsize=9)
    figure.savefig(path, dpi=200)
