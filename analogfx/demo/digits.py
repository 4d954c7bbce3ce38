"""The demo's data, model and training."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from analogfx.demo.settings import Settings


class Digits(NamedTuple):
    """Some of the images."""

    images: Tensor
    """(N, 1, 8, 8) float32, from 0 to 1."""
    labels: Tensor
    """(N,) int64, from 0 to 9."""


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


def optimizer_of(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return the optimizer of every training."""
    return torch.optim.Adam(model.parameters(), lr=settings.learning_rate)


def _batches(digits: Digits, settings: Settings, generator: torch.Generator) -> Iterator[Digits]:
    for rows in torch.randperm(len(digits.labels), generator=generator).split(settings.batch_size):
        yield Digits(digits.images[rows], digits.labels[rows])
