"""Models that peers.py trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions beside a path that skips them (He et al., 2015, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, inputs, size, size) to (n, outputs, size / stride, size / stride)."""
        return nn.functional.relu(self.body(x) + self.skip(x))


def resnet18() -> nn.Module:
    """ResNet-18 for images of 32 x 32: 11,173,962 parameters in 62 tensors."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
    ]  # fmt: skip
    inputs = 64
    for outputs in (64, 128, 256, 512):
        layers += [Block(inputs, outputs, 1 if outputs == 64 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def mlp(inputs: int, hidden: int, layers: int) -> nn.Module:
    """Return a perceptron with so many hidden layers."""
    sizes = [inputs, *[hidden] * layers]
    pairs = ((nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes))
    return nn.Sequential(*itertools.chain(*pairs), nn.Linear(hidden, 10))


class Kind(NamedTuple):
    """A model, and what it is trained on."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int  # of a rank


MODELS = {
    "resnet18": Kind(resnet18, (3, 32, 32), 8),
    "mlp_25M": Kind(partial(mlp, 2048, 2048, 6), (2048,), 32),  # 25,198,602 parameters
    "mlp_2M": Kind(partial(mlp, 1024, 1024, 2), (1024,), 32),  # 2,109,450
}
