"""What training.py knows besides the ready tasks: a perceptron on made-up samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.nn import functional as F

from benchmarks.stragglers_tasks import Emulated
from hpctrain.config import DataConfig
from hpctrain.data.batch import Batch
from hpctrain.data.source import ArraySource, Source
from hpctrain.tasks.task import Loss, Task

SAMPLES, CLASSES = 8192, 10


@dataclass
class Perceptron(Task):
    """1,323,018 parameters, as it is: few multiplications for each parameter to be exchanged."""

    inputs: int = 256
    width: int = 1024

    def model(self) -> nn.Module:
        """Return three linear layers."""
        return nn.Sequential(
            nn.Linear(self.inputs, self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Linear(self.width, CLASSES),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy."""
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def data(self, config: DataConfig) -> dict[str, Source]:
        """Return random samples in memory."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(SAMPLES, self.inputs)).astype(np.float32)
        return {"train": ArraySource({"x": x, "y": rng.integers(0, CLASSES, SAMPLES)})}


@dataclass
class EmulatedPerceptron(Emulated, Perceptron):
    """The same, with a sleep for each sample."""
