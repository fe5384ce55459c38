"""Handwritten digits of 8 x 8 pixels, bundled with scikit-learn: needs no network and no files."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hpctrain.config import DataConfig
from hpctrain.data.batch import Batch
from hpctrain.data.order import EpochOrder
from hpctrain.data.source import ArraySource, Source
from hpctrain.errors import Error
from hpctrain.tasks.task import Loss, Task


def _bundled() -> np.ndarray:
    """Read what ``sklearn.datasets.load_digits`` reads, without the second its import takes.

    Returns:
        A row a digit: 64 pixels of 0 to 16, and the label.

    Raises:
        Error: scikit-learn is not installed.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise Error("the digits come with scikit-learn.", hint="pip install scikit-learn.")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    return np.loadtxt(file, delimiter=",", dtype=np.float64)


@dataclass
class Digits(Task):
    """1,797 digits, a fifth of them for validation, and a small convolutional network."""

    channels: int = 16

    defaults = {
        "train.epochs": 20,
        "train.batch_size": 64,
        "optimizer.lr": 5e-3,
        "schedule.warmup_epochs": 1.0,
        "log.every_steps": 23,
    }
    monitor = "accuracy"
    mode = "max"

    def model(self) -> nn.Module:
        """Return a network of two convolutions and a linear layer."""
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, self.channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(self.channels, 2 * self.channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * self.channels * 16, 10),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy, and accuracy.

        Args:
            model: The network.
            batch: With ``pixels`` of shape (n, 64), float32, and ``label`` of shape (n,).
        """
        scores = model(batch["pixels"])
        correct = scores.argmax(dim=1) == batch["label"]
        return F.cross_entropy(scores, batch["label"]), {"accuracy": correct.float().mean()}

    def predictions(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the scores of the ten digits, and which it is.

        Args:
            model: The network.
            batch: As of :meth:`loss`.
        """
        return {"scores": model(batch["pixels"]), "target": batch["label"]}

    def data(self, config: DataConfig) -> dict[str, Source]:
        """Return the bundled digits, or a shard set at ``data.path`` with pixels and label."""
        if config.path is not None:
            return super().data(config)
        table = _bundled()
        pixels = (table[:, :64] / 16.0).astype("float32")
        labels = table[:, 64].astype("int64")
        order = EpochOrder(len(labels), seed=0, epoch=0).indices(np.arange(len(labels)))
        held, rest = order[: len(labels) // 5], order[len(labels) // 5 :]
        return {
            "train": ArraySource({"pixels": pixels[rest], "label": labels[rest]}),
            "validation": ArraySource({"pixels": pixels[held], "label": labels[held]}),
        }
