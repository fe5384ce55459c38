"""What elastic_overhead.py trains: tasks that take a block of steps whenever they are told to."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hpctrain.config import DataConfig
from hpctrain.data.batch import Batch
from hpctrain.data.source import ArraySource, Source
from hpctrain.tasks import cifar10
from hpctrain.tasks.task import Loss, Task
from hpctrain.world.launcher import detect

SAMPLES = 4096


@dataclass
class Gated:
    """Asks before every block of steps, and says how long the one before took.

    A step is from the start of its forward pass to that of the next one's, with all there is in
    between: the exchange, the update, the loader, the log.

    Attributes:
        gate: A unix socket of who decides. It hears a line of JSON, who this is, and after each
            block another, its seconds; it sends a byte for each block.
        world: A name to tell it.
        block: Steps.
    """

    gate: str = ""
    world: str = ""
    block: int = 1

    def __post_init__(self) -> None:
        self._steps = 0
        self._began = 0.0
        self._gate: socket.socket | None = None

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the task's own loss, after asking whether the next block may begin."""
        if self._steps % self.block == 0:
            self._ask()
        self._steps += 1
        loss: Loss = super().loss(model, batch)  # type: ignore[misc]
        return loss

    def _ask(self) -> None:
        ended = time.perf_counter()
        if self._gate is None:
            self._gate = socket.socket(socket.AF_UNIX)
            self._gate.connect(self.gate)
            told = {"world": self.world, "rank": detect().rank, "pid": os.getpid()}
        else:
            told = {"seconds": ended - self._began}
        self._gate.sendall(json.dumps(told).encode() + b"\n")
        if not self._gate.recv(1):
            os._exit(0)
        self._began = time.perf_counter()


@dataclass
class Cifar10(Gated, cifar10.Cifar10):
    """The ready task `cifar10`, of random images in memory."""

    def data(self, config: DataConfig) -> dict[str, Source]:
        """Return random images: a step takes as long with them."""
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (SAMPLES, 32, 32, 3), np.uint8)
        return {"train": ArraySource({"image": images, "label": rng.integers(0, 10, SAMPLES)})}


class _Perceptron(Task):
    """A perceptron of a few milliseconds a step."""

    def model(self) -> nn.Module:
        """Return a perceptron of three layers."""
        return nn.Sequential(
            nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy."""
        loss: torch.Tensor = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        return loss

    def data(self, config: DataConfig) -> dict[str, Source]:
        """Return random samples in memory."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(SAMPLES, 256)).astype(np.float32)
        return {"train": ArraySource({"x": x, "y": rng.integers(0, 10, SAMPLES)})}


@dataclass
class Perceptron(Gated, _Perceptron):
    """The perceptron, when told to."""
