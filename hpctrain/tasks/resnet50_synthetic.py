"""Train ResNet-50 on images made up from their own numbers: for speed where there are no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format

from hpctrain.config import DataConfig
from hpctrain.data.batch import Batch
from hpctrain.data.random import key, uniform
from hpctrain.data.source import Arrays, Empty, Source
from hpctrain.tasks.task import Loss, Task


@dataclass
class ResNet50Synthetic(Task):
    """He et al., "Deep residual learning for image recognition", CVPR 2016, in its v1.5 form."""

    image_size: int = 224
    samples: int = 1024
    classes: int = 1000

    defaults = {
        "train.epochs": 1,
        "train.batch_size": 32,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.1,
        "optimizer.lr_batch_size": 256,
        "optimizer.weight_decay": 1e-4,
        "schedule.warmup_steps": 5,
        "log.every_steps": 10,
    }

    def model(self) -> nn.Module:
        """Return ResNet-50: 25,557,032 parameters for 1,000 classes."""
        return convert_conv2d_weight_memory_format(resnet50(self.classes), torch.channels_last)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy of the classes.

        Args:
            model: The network.
            batch: With ``image`` of shape (n, 3, size, size) and ``label`` of shape (n,).
        """
        return F.cross_entropy(model(batch["image"]), batch["label"])

    def data(self, config: DataConfig) -> dict[str, Source]:
        """Return images that cost next to nothing to make."""
        return {"train": SyntheticImages(self.samples, self.image_size, self.classes)}


class SyntheticImages(Source):
    """A source whose sample i is a pure function of i."""

    def __init__(self, samples: int, size: int, classes: int) -> None:
        self._samples = samples
        self._classes = classes
        self._pattern = np.linspace(-1, 1, 3 * size * size, dtype=np.float32).reshape(3, size, size)

    def __len__(self) -> int:
        return self._samples

    @property
    def digest(self) -> str:
        """A digest of what the samples are made from."""
        return f"synthetic {self._samples} {self._pattern.shape} {self._classes}"

    def take(self, indices: NDArray[np.int64], empty: Empty = np.empty) -> Arrays:
        """Make images: a pattern scaled by the label, of shape (n, 3, size, size).

        Args:
            indices: Shape (n,): numbers of samples.
            empty: Makes no difference.
        """
        draws = uniform(indices.astype(np.uint64), 1, key(0))
        labels: NDArray[Any] = (draws[:, 0] * self._classes).astype(np.int64)
        scale = (labels / self._classes).astype(np.float32)
        return {"image": scale[:, None, None, None] * self._pattern, "label": labels}


def resnet50(classes: int) -> nn.Sequential:
    """Build ResNet-50: four stages of 3, 4, 6 and 3 bottlenecks."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Bottleneck(inputs, 64 * 2**stage, stride))
            inputs = 256 * 2**stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """A bottleneck: convolutions of 1 x 1, 3 x 3 and 1 x 1, beside a path that skips them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, inputs, height, width) to (n, outputs, height/stride, width/stride)."""
        return F.relu(self.body(x) + self.skip(x))
