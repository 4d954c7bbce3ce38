"""The demo: hardware-aware training against direct mapping, on real handwritten digits.

A small CNN is trained digitally. From that start two ways of equal length go on: more digital
training, whose result is mapped to the analog config as it is, and training with the analog
hardware in the loop. Both analog models are then programmed to many chips: with more and more
noise, and, on chips of phase-change memory, measured from a second to ten years after programming,
with and without compensation of drift. The hardware-aware one is deployed: written as an ONNX file,
and tested in ONNX Runtime.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from analogfx import chip, recipes
from analogfx.api import analogize
from analogfx.checkpoint import save
from analogfx.config import TorchInferenceRPUConfig
from analogfx.demo import pictures
from analogfx.demo.digits import (
    Digits,
    accuracy,
    build_model,
    fit,
    load_digits,
    onnx_accuracy,
    optimizer_of,
    settle_ranges,
)
from analogfx.demo.settings import Settings, quick
from analogfx.errors import AnalogfxError
from analogfx.evaluation import programmed
from analogfx.lifetime import evaluate, named
from analogfx.onnx import export_onnx
from analogfx.report import report
from analogfx.training import clip_after_step

__all__ = [
    "FILES", "DemoError", "Digits", "Settings", "accuracy", "build_model", "fit", "hardware",
    "load_digits", "onnx_accuracy", "quick", "run", "settle_ranges", "table",
]  # fmt: skip

SUMMARY, FIGURE, LIFETIME, PLACEMENT, CHECKPOINT, ONNX = FILES = (
    "summary.json",
    "accuracy.png",
    "lifetime.png",
    "placement.txt",
    "checkpoint",
    "model.onnx",
)
"""What `run` writes; the checkpoint is a folder."""


class DemoError(AnalogfxError):
    """The demo cannot run here, or cannot write where it was told to."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch on one core: small tensors gain nothing from more, and sums would differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(out: Path, settings: Settings) -> dict[str, Any]:
    """Run the demo, write `FILES` into a folder, and return what ``summary.json`` holds.

    Args:
        out: The folder, made where it is missing; results of an earlier run are replaced.

    Raises:
        DemoError: If the folder cannot be written or an extra package is missing; nothing was
            trained then.
    """
    _require_extras()
    _require_writable(out)
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    train, test = load_digits(settings)

    start = build_model()
    fit(start, optimizer_of(start, settings), train, settings, "digital training")

    digital = copy.deepcopy(start)
    fit(digital, optimizer_of(digital, settings), train, settings, "digital training goes on")

    config = hardware(settings, batches=len(train.labels.split(settings.batch_size)))
    mapped = analogize(digital, config)
    settle_ranges(mapped, train, settings)

    aware = analogize(start, config)
    optimizer = optimizer_of(aware, settings)
    clip_after_step(optimizer, aware)
    fit(aware, optimizer, train, settings, "hardware-aware training")
    export_onnx(aware, (test.images[:2],), out / ONNX)

    models: dict[str, nn.Module] = {"mapped": mapped, "hardware_aware": aware}
    summary = {
        "digital": accuracy(digital, test),
        "deployed": {"eager": accuracy(aware, test), "onnx": onnx_accuracy(out / ONNX, test)},
        "noise": under_noise(models, test, settings),
        "lifetime": over_time(models, test, settings),
        "images": {"train": len(train.labels), "test": len(test.labels)},
        "settings": asdict(settings),
        "config": config.to_dict(),
        "versions": _versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    (out / PLACEMENT).write_text(f"{report(aware)}\n")
    save(aware, out / CHECKPOINT)
    pictures.accuracy_against_noise(summary, out / FIGURE)
    pictures.accuracy_over_time(summary, out / LIFETIME)
    return summary


def hardware(settings: Settings, batches: int) -> TorchInferenceRPUConfig:
    """Return the analog config: that of the Analog Foundation Models, fitted to a small CNN.

    Args:
        batches: Number of training batches that set the input ranges, before they are learned.
    """
    config = recipes.afm()
    config.modifier.std_dev = settings.training_noise
    config.mapping.max_input_size = 256  # cuts the classifier into two tiles, no convolution
    config.pre_post.input_range.init_from_data = batches
    # 18 standard deviations are for the outliers of language models, which a small CNN lacks.
    config.pre_post.input_range.init_std_alpha = 4.0
    return config


def under_noise(
    models: dict[str, nn.Module], digits: Digits, settings: Settings
) -> list[dict[str, Any]]:
    """Program each model ``settings.draws`` times at each strength and measure its accuracy.

    Every draw has a seed of its own, which the models share, to be compared on equal noise.

    Returns:
        A row for each strength: ``std_dev``, the ``first_seed`` of its draws (the others count on
        from it), and under each model's name ``mean`` and ``std`` of the accuracy over the draws.
    """
    rows: list[dict[str, Any]] = []
    total = len(models) * len(settings.strengths) * settings.draws
    with tqdm(total=total, desc="programming noise", unit="draw") as bar:
        for std_dev in settings.strengths:
            first = (settings.seed * len(settings.strengths) + len(rows)) * settings.draws
            seeds = range(first, first + settings.draws)
            row: dict[str, Any] = {"std_dev": std_dev, "first_seed": first}
            for name, model in models.items():
                accuracies = []
                for seed in seeds:
                    with programmed(model, std_dev, seed):
                        accuracies.append(accuracy(model, digits))
                    bar.update()
                std, mean = torch.std_mean(torch.tensor(accuracies, dtype=torch.float64))
                row[name] = {"mean": mean.item(), "std": std.item()}
            rows.append(row)
    return rows


def over_time(
    models: dict[str, nn.Module], digits: Digits, settings: Settings
) -> list[dict[str, Any]]:
    """Program each model to ``settings.draws`` chips of phase-change memory and let them age.

    Every chip is measured twice: as it is, and with one factor a tile that makes up for the mean
    drift of its conductances.

    Returns:
        A row for each time: ``seconds``, and under the name of a model, with ``_compensated``
        behind it for the second measurement, ``mean``, ``std``, ``low`` and ``high`` of the
        accuracy over chips; the last two are the quantiles at 5 % and 95 %.
    """
    rows: list[dict[str, Any]] = [{"seconds": seconds} for seconds in settings.times]
    arms = [(name, way) for name in models for way in ("", "_compensated")]
    for name, way in tqdm(arms, desc="chips over time", unit="model"):
        life = evaluate(
            models[name],
            lambda model: accuracy(model, digits),
            noise_model=chip.PCMLikeNoiseModel(),
            compensation=chip.GlobalDriftCompensation() if way else None,
            times=settings.times,
            chips=settings.draws,
            seed=settings.seed,
            progress=False,
        )
        columns = life.mean, life.std, life.quantile(0.05), life.quantile(0.95)
        for row, *values in zip(rows, *columns, strict=True):
            row[name + way] = dict(zip(("mean", "std", "low", "high"), values, strict=True))
    return rows


def table(summary: dict[str, Any]) -> str:
    """Return the accuracies of a summary as text, in percent."""
    lines = [
        f"digital accuracy: {summary['digital']:.1%}",
        "",
        "noise      mapped as it is    hardware-aware",
    ]
    models = "mapped", "hardware_aware"
    for row in summary["noise"]:
        lines.append(f"{row['std_dev']:5.0%}      " + "     ".join(_cell(row[m]) for m in models))
    lines += ["", "age        mapped as it is    hardware-aware    compensated: mapped, aware"]
    arms = (*models, *(f"{name}_compensated" for name in models))
    for row in summary["lifetime"]:
        lines.append(f"{named(row['seconds']):>6}     " + "     ".join(_cell(row[a]) for a in arms))
    deployed = summary["deployed"]
    lines += [
        "",
        f"hardware-aware, as {ONNX} in ONNX Runtime: {deployed['onnx']:.1%} "
        f"(in PyTorch: {deployed['eager']:.1%})",
    ]
    return "\n".join(lines)


def _cell(values: dict[str, float]) -> str:
    return f"{100 * values['mean']:5.1f} ± {100 * values['std']:4.1f} %"


def _require_extras() -> None:
    modules = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    modules |= {name: name for name in ("onnx", "onnxscript", "onnxruntime")}
    missing = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DemoError(f'the demo needs {" and ".join(missing)}: pip install "analogfx[demo]"')


def _require_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise DemoError(f"cannot write to {out}: {error.strerror}") from error


def _versions() -> dict[str, str]:
    packages = ("analogfx", "torch", "numpy", "scikit-learn", "matplotlib", "onnxruntime")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
