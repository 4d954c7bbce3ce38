"""The demo: hardware-aware training against direct mapping, on real handwritten digits.

A small CNN is trained digitally. From that start two ways of equal length go on: more digital
training, whose result is mapped to the analog config as it is, and training with the analog
hardware in the loop. Both analog models are then programmed many times, with more and more noise.
The hardware-aware one is deployed: written as an ONNX file, and tested in ONNX Runtime.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import platform
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from analogfx import recipes
from analogfx.api import analogize
from analogfx.checkpoint import save
from analogfx.config import TorchInferenceRPUConfig
from analogfx.errors import AnalogfxError
from analogfx.evaluation import programmed
from analogfx.onnx import export_onnx
from analogfx.report import report
from analogfx.training import clip_after_step

SUMMARY, FIGURE, PLACEMENT, CHECKPOINT, ONNX = FILES = (
    "summary.json",
    "accuracy.png",
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
    draws: int = 25
    """How many times an analog model is programmed at each strength."""


def quick(seed: int = 0, epochs: int = 12) -> Settings:
    """Return settings for a rough result in a few seconds."""
    return Settings(seed=seed, epochs=epochs, draws=5)


class Digits(NamedTuple):
    """Some of the images."""

    images: Tensor
    """(N, 1, 8, 8) float32, from 0 to 1."""
    labels: Tensor
    """(N,) int64, from 0 to 9."""


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
    fit(start, _optimizer(start, settings), train, settings, "digital training")

    digital = copy.deepcopy(start)
    fit(digital, _optimizer(digital, settings), train, settings, "digital training goes on")

    config = hardware(settings, batches=len(train.labels.split(settings.batch_size)))
    mapped = analogize(digital, config)
    settle_ranges(mapped, train, settings)

    aware = analogize(start, config)
    optimizer = _optimizer(aware, settings)
    clip_after_step(optimizer, aware)
    fit(aware, optimizer, train, settings, "hardware-aware training")
    export_onnx(aware, (test.images[:2],), out / ONNX)

    summary = {
        "digital": accuracy(digital, test),
        "deployed": {"eager": accuracy(aware, test), "onnx": onnx_accuracy(out / ONNX, test)},
        "noise": under_noise({"mapped": mapped, "hardware_aware": aware}, test, settings),
        "images": {"train": len(train.labels), "test": len(test.labels)},
        "settings": asdict(settings),
        "config": config.to_dict(),
        "versions": _versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    (out / PLACEMENT).write_text(f"{report(aware)}\n")
    save(aware, out / CHECKPOINT)
    plot(summary, out / FIGURE)
    return summary


def load_digits(settings: Settings) -> tuple[Digits, Digits]:
    """Return scikit-learn's 1,797 digits, split so that both parts hold every digit alike."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    parts = train_test_split(
        torch.arange(len(labels)).numpy(),
        test_size=settings.test_share,
        stratify=data.target,
        random_state=settings.seed,
    )
    train, test = (Digits(images[part], labels[part]) for part in parts)
    return train, test


def build_model() -> nn.Sequential:
    """Return a CNN of three convolutions and a classifier, for `Digits.images`."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 16, 3, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv3=nn.Conv2d(16, 32, 3, padding=1),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            classifier=nn.Linear(512, 10),
        )
    )


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


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    digits: Digits,
    settings: Settings,
    title: str,
) -> None:
    """Train a model by cross-entropy for ``settings.epochs`` and leave it in evaluation mode."""
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    for _ in tqdm(range(settings.epochs), desc=title, unit="epoch"):
        for batch in _batches(digits, settings, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def settle_ranges(analog: nn.Module, digits: Digits, settings: Settings) -> None:
    """Set the input ranges from one pass over the data and change nothing else.

    The ranges belong to the mapping: without them the converters would not fit the activations.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    analog.train()
    for batch in _batches(digits, settings, generator):
        analog(batch.images)
    analog.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of images that a model names correctly."""
    return (model(digits.images).argmax(1) == digits.labels).double().mean().item()


def onnx_accuracy(path: Path, digits: Digits) -> float:
    """Return the share of images that a file names correctly in stock ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: digits.images.numpy()})
    return float((scores.argmax(1) == digits.labels.numpy()).mean())


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


def table(summary: dict[str, Any]) -> str:
    """Return the accuracies of a summary as text, in percent."""
    lines = [
        f"digital accuracy: {summary['digital']:.1%}",
        "",
        "noise      mapped as it is    hardware-aware",
    ]
    for row in summary["noise"]:
        cells = [f"{100 * row[name]['mean']:5.1f} ± {100 * row[name]['std']:4.1f} %"
                 for name in ("mapped", "hardware_aware")]  # fmt: skip
        lines.append(f"{row['std_dev']:5.0%}      {cells[0]}     {cells[1]}")
    deployed = summary["deployed"]
    lines += [
        "",
        f"hardware-aware, as {ONNX} in ONNX Runtime: {deployed['onnx']:.1%} "
        f"(in PyTorch: {deployed['eager']:.1%})",
    ]
    return "\n".join(lines)


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw accuracy against programming noise: means, and bands of one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    rows = summary["noise"]
    strengths = [row["std_dev"] for row in rows]

    axes.axhline(summary["digital"], color="0.35", linestyle="--", linewidth=1.2, label="digital")
    for name, label, color, marker in (
        ("hardware_aware", "analog, trained hardware-aware", "#0072B2", "o"),
        ("mapped", "analog, mapped as it is", "#D55E00", "s"),
    ):
        mean = [row[name]["mean"] for row in rows]
        low = [row[name]["mean"] - row[name]["std"] for row in rows]
        high = [min(row[name]["mean"] + row[name]["std"], 1.0) for row in rows]
        axes.fill_between(strengths, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(strengths, mean, color=color, marker=marker, markersize=5, label=label)

    draws = summary["settings"]["draws"]
    axes.set_title("Handwritten digits on an 8-bit analog chip", loc="left", fontsize=11)
    axes.set_xlabel("programming noise σ, relative to the channel's largest weight")
    axes.set_ylabel(f"test accuracy, mean ± σ of {draws} draws")
    axes.set_xticks(strengths)
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", framealpha=1, edgecolor="none")
    figure.savefig(path, dpi=200)


def _batches(digits: Digits, settings: Settings, generator: torch.Generator) -> Iterator[Digits]:
    for rows in torch.randperm(len(digits.labels), generator=generator).split(settings.batch_size):
        yield Digits(digits.images[rows], digits.labels[rows])


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=settings.learning_rate)


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
