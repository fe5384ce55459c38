"""Handwritten digits of 8 x 8 pixels, bundled with scikit-learn: needs no network and no files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.nn import functional as F

from hpctrain.config import DataConfig
from hpctrain.data.batch import Batch
from hpctrain.data.order import EpochOrder
from hpctrain.data.source import ArraySource, Source
from hpctrain.task import Loss, Task


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
        """Two convolutions and a linear layer."""
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
        """Cross entropy, and accuracy."""
        scores = model(batch["pixels"])
        correct = scores.argmax(dim=1) == batch["label"]
        return F.cross_entropy(scores, batch["label"]), {"accuracy": correct.float().mean()}

    def data(self, config: DataConfig) -> dict[str, Source]:
        """The bundled digits, or the shard set at ``data.path`` with fields pixels and label."""
        if config.path is not None:
            return super().data(config)
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = (digits.data / 16.0).astype("float32")
        labels = digits.target.astype("int64")
        order = EpochOrder(len(labels), seed=0, epoch=0).indices(np.arange(len(labels)))
        held, rest = order[: len(labels) // 5], order[len(labels) // 5 :]
        return {
            "train": ArraySource({"pixels": pixels[rest], "label": labels[rest]}),
            "validation": ArraySource({"pixels": pixels[held], "label": labels[held]}),
        }
